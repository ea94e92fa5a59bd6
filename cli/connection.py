"""Which server to talk to, with which key and in which project: from options first, then from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from cli.errors import UsageError

DEFAULT_URL = "http://127.0.0.1:8000/v1"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_NO_KEY = (
    "no API key: set LOMO_API_KEY to the key, or give --api-key-file (or LOMO_API_KEY_FILE) the path of a file that "
    "holds it; `lomo up` prints where it wrote the first one"
)


@dataclass(frozen=True, slots=True)
class Connection:
    """A server's API and the key to it."""

    url: str
    """Of the API, `/v1` included, without a slash at the end."""
    api_key: str | None = field(default=None, repr=False)
    project: str | None = None
    """The one that an administrator's key is to act in; None: the whole organization."""

    @property
    def root_url(self) -> str:
        """Of the server itself, where /healthz is."""
        return self.url.removesuffix("/v1")

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine."""
        return urlsplit(self.url).hostname in _LOOPBACK

    @property
    def required_key(self) -> str:
        """The key.

        Raises:
            UsageError: none was given.
        """
        if self.api_key is None:
            raise UsageError(_NO_KEY)
        return self.api_key


def find_connection(*, url: str | None, api_key_file: Path | None, env: Mapping[str, str]) -> Connection:
    """Put the options and the environment together; an option wins, LOMO_* wins over OPENAI_*. The project is
    LOMO_PROJECT's alone: OPENAI_PROJECT_ID may be one of OpenAI's, which nobody here knows.

    Raises:
        UsageError: the URL is none, the key file cannot be read, or the project's id cannot be one.
    """
    given = url or env.get("LOMO_URL") or env.get("OPENAI_BASE_URL") or DEFAULT_URL
    project = env.get("LOMO_PROJECT")
    if project:
        project = _one_word(project, "LOMO_PROJECT does not hold the id of a project: expected one like proj_...")
    return Connection(normalise_url(given), _find_key(api_key_file, env), project or None)


def normalise_url(text: str) -> str:
    """Complete a server's address to the URL of its API: `host:8000/` becomes `http://host:8000/v1`.

    Raises:
        UsageError: it is not an address of a web server.
    """
    url = text.strip()
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        port_is_valid = False
    if parts.scheme not in {"http", "https"} or not parts.hostname or not port_is_valid:
        raise UsageError(f"{text!r} is not the URL of a server: write it like {DEFAULT_URL}")
    if parts.query or parts.fragment or parts.username is not None:
        raise UsageError(f"the URL of the server must end with its path (like {DEFAULT_URL}); the key goes elsewhere")
    path = parts.path.rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path if path.endswith("/v1") else f"{path}/v1", "", ""))


def _find_key(option: Path | None, env: Mapping[str, str]) -> str | None:
    if option is not None:
        return _read_key(option)
    if key := env.get("LOMO_API_KEY"):
        return _checked(key, "LOMO_API_KEY")
    if path := env.get("LOMO_API_KEY_FILE"):
        return _read_key(Path(path))
    if key := env.get("OPENAI_API_KEY"):
        return _checked(key, "OPENAI_API_KEY")
    return None


def _read_key(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"cannot read the API key from {path}: {reason}") from error
    return _checked(text, str(path))


def _checked(text: str, where: str) -> str:
    return _one_word(text, f"{where} does not hold an API key: expected one line like sk-lomo-...")


def _one_word(text: str, otherwise: str) -> str:
    """What must fit into a header: one word of printable ASCII."""
    word = text.strip()
    if not word or not word.isascii() or not word.isprintable() or " " in word:
        raise UsageError(otherwise)
    return word
