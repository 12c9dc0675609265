"""Reports of evaluations, as JSON and as self-contained HTML pages, and their charts."""
