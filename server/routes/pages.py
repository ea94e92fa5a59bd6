"""The dashboard's two pages. They hold no data: that comes from `/v1` with the session's cookie."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from jobs import keys
from server.auth import SESSION_COOKIE, Credential, check_origin, find_credential
from server.deps import ServicesDep, authenticated, identify
from server.errors import ApiError

router = APIRouter()

DASHBOARD_DIR = Path(__file__).parents[1] / "dashboard"
# The place in login.html for one sentence.
_ERROR_PLACE = "<!--error-->"
_SEE_OTHER = 303
_WRONG_KEY = "This API key is not valid. It starts with sk-lomo- and was written when the server was set up."


async def read_login_key(request: Request) -> str:
    """The field of the login form; empty where it is missing. Another site's page cannot send it."""
    check_origin(request, method=request.method, required=False)
    async with request.form(max_files=0, max_fields=4) as form:
        value = form.get("api_key")
    return value.strip() if isinstance(value, str) else ""


@router.get("/")
def get_dashboard(request: Request, services: ServicesDep) -> Response:
    """The dashboard, or the way to the login."""
    credential = find_credential(request)
    if credential is None or identify(request, services, credential) is None:
        return RedirectResponse("/login", _SEE_OTHER)
    return FileResponse(DASHBOARD_DIR / "index.html", headers={"Cache-Control": "no-cache"})


@router.get("/login")
def get_login() -> Response:
    """The login form."""
    return _login_page()


@router.post("/login")
def log_in(request: Request, services: ServicesDep, api_key: Annotated[str, Depends(read_login_key)]) -> Response:
    """Exchange an API key for a session's cookie."""
    try:
        principal = identify(request, services, Credential("key", api_key), fresh=True)
    except ApiError as error:
        return _login_page(error.message, status=error.status)
    if principal is None:
        return _login_page(_WRONG_KEY, status=401)
    response = RedirectResponse("/", _SEE_OTHER)
    response.set_cookie(
        SESSION_COOKIE,
        keys.open_session(services.db, principal),
        max_age=int(keys.SESSION_LIFETIME.total_seconds()),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout", dependencies=[Depends(authenticated)])
def log_out(request: Request, services: ServicesDep) -> Response:
    """End the session and forget its cookie."""
    cookie = request.cookies.get(SESSION_COOKIE)
    if cookie:
        services.authenticator.close_session(Credential("session", cookie))
    response = RedirectResponse("/login", _SEE_OTHER)
    response.delete_cookie(SESSION_COOKIE, httponly=True, samesite="strict")
    return response


def _login_page(error: str = "", *, status: int = 200) -> Response:
    page = (DASHBOARD_DIR / "login.html").read_text(encoding="utf-8")
    return HTMLResponse(page.replace(_ERROR_PLACE, html.escape(error)), status)
