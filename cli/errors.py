"""What can go wrong for a user of the command. The texts are whole sentences for people; `main` prints them.

CliError                 exit code 1
  UsageError             exit code 2: an option, a file or the environment is wrong
  ApiError               the server answered with an error: `status`, `code` and `param` as sent
  UnreachableError       there was no answer
"""

from __future__ import annotations


class CliError(Exception):
    """Base: `str(error)` is what the user reads."""

    exit_code = 1


class UsageError(CliError):
    """The call itself is wrong; nothing was sent."""

    exit_code = 2


class ApiError(CliError):
    """The server refused. `status` is that of HTTP; `code` and `param` come from the body, or are None."""

    def __init__(self, message: str, *, status: int, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class UnreachableError(CliError):
    """Nobody listens, the host does not exist, or the connection broke: another try may work."""
