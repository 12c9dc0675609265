"""The playground: a page that the server gives at `/`, with its style and script."""
