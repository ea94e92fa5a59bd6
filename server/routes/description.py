"""`/openapi.json`: what the API takes and answers. Holds nothing of anybody's, so it needs no key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.openapi import describe

router = APIRouter()


@router.get("/openapi.json", include_in_schema=False)
def get_description(request: Request) -> Response:
    """The description, made at the first request for it."""
    state = request.app.state
    if not hasattr(state, "description"):
        state.description = describe(request.app)
    return JSONResponse(state.description)
