"""The `lomo` command: a client of the HTTP API."""
