"""The endpoints, a module per kind of object. Each checks, asks `jobs/` and describes; none knows SQL or the broker."""
