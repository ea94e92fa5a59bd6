"""The whole service on one machine, from wheels: Postgres, Valkey, the server, the worker and beat as one process tree.

This is what `lomo up`, the demo and the tests start. It exists so that nobody has to install a database or a broker
to try the server; what runs is the same code against the same kinds of servers as in a container deployment.
"""
