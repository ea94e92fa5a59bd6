"""The HTTP API as functions: one place that sends requests and turns whatever fails into a `CliError`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from cli.connection import Connection
from cli.errors import ApiError, UnreachableError, UsageError

Json = dict[str, Any]
Query = Mapping[str, str | int | None]

_CONNECT_TIMEOUT_S = 5.0  # as the openai client
# A model that is new to the server is read first, which may take it 90 s (jobs/shape_cache.py) and takes 6.
_TIMEOUT_S = 120.0
# After the last byte the server still writes the file to disk: 512 MiB at 10 MB/s, slow for a disk, take a minute.
_UPLOAD_TIMEOUT_S = 600.0
_PAGE = 100
_CHUNK_BYTES = 1 << 20


class ApiClient:
    """A connection to one server: `with ApiClient(connection) as client: ...`.

    Each method raises ApiError where the server refuses, UnreachableError where there is no answer, and UsageError
    where there is no key.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._http = httpx.Client(
            timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            headers={"User-Agent": f"lomo-cli/{version('lomo-server')}"},
            # A proxy from the environment cannot reach this machine's own loopback.
            trust_env=not connection.is_loopback,
        )

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, query: Query | None = None) -> Json:
        """GET an object below `/v1`."""
        return self._send("GET", path, params=_present(query))

    def post(self, path: str, body: Json | None = None) -> Json:
        """POST a JSON body, or none, and return the object that comes back."""
        return self._send("POST", path, json=body)

    def delete(self, path: str) -> Json:
        """DELETE an object."""
        return self._send("DELETE", path)

    def list(self, path: str, *, limit: int, query: Query | None = None) -> Json:
        """Collect up to `limit` items of a list, page by page; `has_more` tells whether there are others."""
        items: list[Json] = []
        asked = {**_present(query)}
        while True:
            page = self.get(path, {**asked, "limit": min(_PAGE, limit - len(items))})
            items += page["data"]
            has_more = bool(page.get("has_more"))
            if not has_more or not page["data"] or len(items) >= limit:
                return {"object": "list", "data": items, "has_more": has_more}
            asked["after"] = page["data"][-1]["id"]

    def upload(self, path: Path, *, purpose: str, on_read: Callable[[int], None]) -> Json:
        """Send a file in bounded memory; `on_read` hears the number of bytes of each chunk.

        Raises:
            UsageError: the file cannot be read.
        """
        try:
            file = _CountedFile(path, on_read)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        with file:
            return self._send(
                "POST",
                "/files",
                data={"purpose": purpose},
                files={"file": (path.name, file)},
                timeout=httpx.Timeout(_UPLOAD_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            )

    def download(self, path: str) -> Iterator[bytes]:
        """Yield the bytes of a resource as they come."""
        with self.stream(path) as response, self._translated():
            yield from response.iter_bytes(_CHUNK_BYTES)

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Json | None = None,
        read_timeout_s: float = _TIMEOUT_S,
    ) -> Iterator[httpx.Response]:
        """Open a response whose body is read piece by piece; what the reading raises is the caller's. A `body` is
        POSTed."""
        request = self._http.build_request(
            "GET" if body is None else "POST",
            self.connection.url + path,
            json=body,
            headers={**self._auth(), **(headers or {})},
            timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S, read=read_timeout_s),
        )
        with self._translated():
            response = self._http.send(request, stream=True)
        try:
            if response.is_error:
                with self._translated():
                    response.read()
                raise _api_error(response)
            yield response
        finally:
            response.close()

    def probe(self, path: str) -> tuple[int, Json]:
        """GET a health endpoint of the server itself: without a key, and an error status is an answer too."""
        with self._translated():
            response = self._http.get(self.connection.root_url + path)
        return response.status_code, self._object(response)

    def _send(self, method: str, path: str, **options: Any) -> Json:
        with self._translated():
            response = self._http.request(method, self.connection.url + path, headers=self._auth(), **options)
        if response.is_error:
            raise _api_error(response)
        return self._object(response)

    def _auth(self) -> dict[str, str]:
        place = {} if self.connection.project is None else {"OpenAI-Project": self.connection.project}
        return {"Authorization": f"Bearer {self.connection.required_key}", **place}

    def _object(self, response: httpx.Response) -> Json:
        try:
            body = response.json()
        except ValueError as error:
            raise self._not_lomo(response) from error
        if not isinstance(body, dict):
            raise self._not_lomo(response)
        return body

    def _not_lomo(self, response: httpx.Response) -> ApiError:
        where = f"{self.connection.root_url} answered {response.status_code} with something that is not JSON"
        return ApiError(f"{where}: is it a LOMO server?", status=response.status_code)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(error, self.connection) from error


class _CountedFile:
    """A file to send that tells how much of it was read. Duck-typed to what httpx asks of a file."""

    def __init__(self, path: Path, on_read: Callable[[int], None]) -> None:
        self._file = path.open("rb")
        self._on_read = on_read

    def __enter__(self) -> _CountedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def fileno(self) -> int:
        """For the length of the body."""
        return self._file.fileno()

    def read(self, size: int = -1) -> bytes:
        """The next chunk."""
        chunk = self._file.read(size)
        self._on_read(len(chunk))
        return chunk


def unreachable(error: httpx.HTTPError | httpx.InvalidURL, connection: Connection) -> UnreachableError:
    """Say in one sentence why there was no (whole) answer."""
    url = connection.root_url
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        reason = f" ({error})" if "refused" not in str(error) and str(error) else ""
        return UnreachableError(f"no server at {url}{reason}: start one with `lomo up`, or name another by --url")
    if isinstance(error, httpx.TimeoutException):
        return UnreachableError(f"the server at {url} did not answer in time")
    return UnreachableError(f"the connection to {url} broke: {error}")


def _present(query: Query | None) -> dict[str, str | int]:
    return {key: value for key, value in (query or {}).items() if value is not None}


def _api_error(response: httpx.Response) -> ApiError:
    """Read OpenAI's error object; a proxy in between may have answered in its own words."""
    status = response.status_code
    try:
        error = response.json()["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        return ApiError(f"the server answered {status} {response.reason_phrase}", status=status)
    # A message may have a table below its first line.
    first, newline, rest = message.partition("\n")
    text = message if code is None or code in message else f"{first} [{code}]{newline}{rest}"
    if status == httpx.codes.UNAUTHORIZED and code != "mismatched_project":
        text += " Give the key by LOMO_API_KEY or --api-key-file."
    return ApiError(text, status=status, code=code, param=param)
