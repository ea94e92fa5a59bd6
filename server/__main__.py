"""`python -m server`: serve the API and the dashboard until told to stop (SIGTERM or SIGINT)."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from jobs.settings import SettingsError, load_settings
from server import logs
from server.serve import Server
from server.settings import ServerSettings


def main() -> int:
    """Run the server. Returns the exit code: 0 after a stop, 2 for wrong settings, 3 when it could not start."""
    try:
        settings = load_settings(ServerSettings)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.configure(settings.log_level)
    for number in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn takes these over while it runs and raises them again after its stop, which should be a quiet one.
        signal.signal(number, _exit_quietly)
    server = Server(settings)
    server.run()
    return 0 if server.started else 3


def _exit_quietly(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
