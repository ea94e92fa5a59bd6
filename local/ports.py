"""The server's TCP port: is it free, and which one is?"""

from __future__ import annotations

import errno
import os
import socket

from local.errors import PortError


def reserve_port(host: str, port: int) -> int:
    """Return `port` if a server could listen on it, or a free one if `port` is 0.

    The port is tried out and let go, so that nothing has been started when it turns out to be taken.
    Raises PortError.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError) as error:
        raise PortError(f"There is no address {host}, port {port}, on this machine. Set --host and --port.") from error
    with socket.socket(family, kind, protocol) as probe:
        # As the server does: connections of an earlier one that are still closing do not make the port busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise PortError(_explain(error, host, port)) from error
        return int(probe.getsockname()[1])


def local_url(host: str, port: int) -> str:
    """Return the address at which this machine reaches a server that listens on `host`."""
    if host in {"0.0.0.0", "::", ""}:  # noqa: S104 - compared with, not listened on
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} on {host} is already in use. Choose another one with --port."
    if error.errno == errno.EACCES:
        return f"This user may not listen on port {port}. Choose one above 1023 with --port."
    return f"Cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}. Set --host and --port."
