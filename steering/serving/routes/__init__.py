"""What clients of the server send and get: checked bodies, documents, streams, and the routes."""
