"""The `lomo` command: a client of the HTTP API, so that it works against any server, and `lomo up`."""
