"""Uvicorn, set up for this server: one process, bounded connections, and a stop that open streams do not hold up."""

from __future__ import annotations

import socket

import uvicorn

from server.http_protocol import BoundedHttpProtocol
from server.main import create_app
from server.services import Services
from server.settings import ServerSettings


class Server(uvicorn.Server):
    """A server that ends its event streams first when it stops: uvicorn itself would wait for them to end."""

    def __init__(self, settings: ServerSettings) -> None:
        app = create_app(settings)
        self.services: Services = app.state.services
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.server_host,
                port=settings.server_port,
                http=BoundedHttpProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=settings.max_connections,
                timeout_graceful_shutdown=settings.server_stop_grace_s,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then everything else."""
        self.services.hub.stop_streams()
        await super().shutdown(sockets)
