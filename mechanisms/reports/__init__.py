"""Results as tables, JSON documents and pages."""
