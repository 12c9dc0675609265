"""Reports as JSON and as self-contained pages, and their charts."""
