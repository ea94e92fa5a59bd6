"""`lomo keys`: the API keys of the caller's organization. A key's value is printed when it is made, and never again."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.client import ApiClient, Json
from cli.errors import UsageError
from cli.output import NOTHING, format_age, format_time, say, write_json, write_table
from cli.quantities import parse_seconds
from cli.session import Session, with_session

app = typer.Typer(no_args_is_help=True, help="API keys (with a key that has the scope admin).")

PROJECTS = "/organization/projects"
ADMIN_KEYS = "/organization/admin_api_keys"
ALL = 10_000
"""More than anybody has of projects, keys or organizations."""

KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="The 12 characters after sk-lomo-.")]
ProjectOption = Annotated[str | None, typer.Option("--project", metavar="ID", help="Like proj_...")]


@app.command("list")
@with_session
def list_keys(*, project: ProjectOption = None, session: Session) -> None:
    """List the keys of every project, or of one."""
    with session.connect() as client:
        keys = [key for path in _places(client, project) for key in client.list(path, limit=ALL)["data"]]
    if session.is_json:
        write_json({"object": "list", "data": keys, "has_more": False})
        return
    rows = [
        (
            key["id"],
            key["name"],
            key["project_id"],
            format_age(key["last_used_at"]) if key["last_used_at"] else "never",
            format_time(key["expires_at"]),
            " ".join(key["scopes"]),
        )
        for key in keys
    ]
    write_table(("ID", "NAME", "PROJECT", "USED", "EXPIRES", "SCOPES"), rows)


@app.command("create")
@with_session
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    *,
    project: ProjectOption = None,
    scope: Annotated[
        list[str] | None, typer.Option(metavar="SCOPE", help="Like jobs:read; again for others. All but admin if none.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="A key that administers the organization.")] = False,
    expires_in: Annotated[str | None, typer.Option(metavar="TIME", help="Like 90d or 24h.")] = None,
    session: Session,
) -> None:
    """Make a key; its value is printed, and cannot be shown again."""
    body: Json = {"name": name}
    if expires_in is not None:
        body["expires_in_seconds"] = parse_seconds(expires_in, option="--expires-in")
    if admin and (project or scope):
        raise UsageError("a key with --admin is the whole organization's: leave --project and --scope out")
    if scope:
        body["scopes"] = scope
    with session.connect() as client:
        path = ADMIN_KEYS if admin else f"{PROJECTS}/{project or _default_project(client)}/api_keys"
        key = client.post(path, body)
    show_new_key(key, session)


@app.command("update")
@with_session
def update_key(
    key_id: KeyId,
    *,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="SCOPE", help="Like jobs:read; again for others. Replaces all."),
    ] = None,
    expires_in: Annotated[str | None, typer.Option(metavar="TIME", help="From now on, like 90d or 24h.")] = None,
    session: Session,
) -> None:
    """Change a key's name, scopes or end; its id is printed."""
    body: Json = {"name": name, "scopes": scope or None}
    if expires_in is not None:
        body["expires_in_seconds"] = parse_seconds(expires_in, option="--expires-in")
    with session.connect() as client:
        key = client.post(_find(client, key_id), {field: value for field, value in body.items() if value is not None})
    if session.is_json:
        write_json(key)
    else:
        typer.echo(key["id"])


@app.command("rotate")
@with_session
def rotate_key(
    key_id: KeyId,
    *,
    grace: Annotated[str, typer.Option(metavar="TIME", help="How long the old value is still taken.")] = "24h",
    session: Session,
) -> None:
    """Give a key another value; the old one ends after a grace."""
    grace_s = parse_seconds(grace, option="--grace")
    with session.connect() as client:
        key = client.post(f"{_find(client, key_id)}/rotate", {"grace_s": grace_s})
    show_new_key(key, session)


@app.command("revoke")
@with_session
def revoke_key(key_id: KeyId, *, session: Session) -> None:
    """End a key for good; its id is printed."""
    with session.connect() as client:
        result = client.delete(_find(client, key_id))
    if session.is_json:
        write_json(result)
    else:
        typer.echo(result["id"])


def show_new_key(key: dict[str, Any], session: Session) -> None:
    """Print a key's value, which is told at this moment only."""
    if session.is_json:
        write_json(key)
        return
    expires = format_time(key["expires_at"])
    until = "" if expires == NOTHING else f" It ends on {expires}."
    if key["previous_expires_at"]:
        until += f" The old value ends on {format_time(key['previous_expires_at'])}."
    say(f"Key {key['id']} ({key['name']}). Its value follows; it cannot be shown again.{until}")
    typer.echo(key["value"])


def _places(client: ApiClient, project: str | None = None) -> list[str]:
    """Where keys are listed: one project, or all of them."""
    ids = [project] if project else [found["id"] for found in client.list(PROJECTS, limit=ALL)["data"]]
    return [f"{PROJECTS}/{project_id}/api_keys" for project_id in ids]


def _default_project(client: ApiClient) -> str:
    return next(str(found["id"]) for found in client.list(PROJECTS, limit=ALL)["data"] if found["is_default"])


def _find(client: ApiClient, key_id: str) -> str:
    """The path of a key by its id.

    Raises:
        UsageError: there is no such one.
    """
    for path in _places(client):
        if any(key["id"] == key_id for key in client.list(path, limit=ALL)["data"]):
            return f"{path}/{key_id}"
    raise UsageError(f"your organization has no key {key_id}; `lomo keys list` shows those that it has")
