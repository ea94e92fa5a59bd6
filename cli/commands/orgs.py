"""`lomo orgs` and `lomo projects`: who the tenants are, and what they may use."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.commands.keys import ALL, PROJECTS, show_new_key
from cli.output import format_age, format_bytes, format_number, format_seconds, write_fields, write_json, write_table
from cli.quantities import NONE, parse_bytes, parse_count, parse_seconds
from cli.session import Session, with_session

app = typer.Typer(no_args_is_help=True, help="Organizations and what they may use (for whoever runs the service).")
projects = typer.Typer(no_args_is_help=True, help="Projects of your organization (with the scope admin).")

ORGANIZATIONS = "/organizations"

OrganizationId = Annotated[str, typer.Argument(metavar="ORGANIZATION_ID", help="Like org-...")]
ProjectId = Annotated[str, typer.Argument(metavar="PROJECT_ID", help="Like proj_...")]
Name = Annotated[str, typer.Argument(help="Its name.")]
QueuedOption = Annotated[str | None, typer.Option("--max-queued-jobs", metavar="N", help="A number, or none.")]
RunningOption = Annotated[str | None, typer.Option("--max-running-jobs", metavar="N", help="A number, or none.")]
GpuOption = Annotated[
    str | None, typer.Option("--max-gpu-time", metavar="TIME", help="Within 30 days, like 100h; or none.")
]
StoredOption = Annotated[str | None, typer.Option("--max-stored", metavar="SIZE", help="Like 50GiB; or none.")]
PriorityOption = Annotated[str | None, typer.Option("--max-priority", metavar="N", help="-100 to 100; or none.")]


@app.command("list")
@with_session
def list_organizations(*, session: Session) -> None:
    """List every organization and its quotas."""
    with session.connect() as client:
        page = client.list(ORGANIZATIONS, limit=ALL)
    if session.is_json:
        write_json(page)
        return
    rows = [
        (item["id"], item["name"], *_quota_cells(item["quotas"]), format_age(item["created_at"]))
        for item in page["data"]
    ]
    write_table(("ID", "NAME", "QUEUED", "RUNNING", "GPU TIME", "STORED", "PRIORITY", "CREATED"), rows)


@app.command("create")
@with_session
def create_organization(  # noqa: PLR0913 - the options of a command
    name: Name,
    *,
    max_queued_jobs: QueuedOption = None,
    max_running_jobs: RunningOption = None,
    max_gpu_time: GpuOption = None,
    max_stored: StoredOption = None,
    max_priority: PriorityOption = None,
    session: Session,
) -> None:
    """Make an organization; its id is printed. It has no key yet: see `lomo orgs key`."""
    quotas = _quotas(
        queued=max_queued_jobs, running=max_running_jobs, gpu=max_gpu_time, stored=max_stored, priority=max_priority
    )
    with session.connect() as client:
        made = client.post(ORGANIZATIONS, {"name": name, "quotas": quotas})
    if session.is_json:
        write_json(made)
    else:
        typer.echo(made["id"])


@app.command("update")
@with_session
def update_organization(  # noqa: PLR0913 - the options of a command
    organization_id: OrganizationId,
    *,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    max_queued_jobs: QueuedOption = None,
    max_running_jobs: RunningOption = None,
    max_gpu_time: GpuOption = None,
    max_stored: StoredOption = None,
    max_priority: PriorityOption = None,
    session: Session,
) -> None:
    """Change an organization's name or quotas; what is not given stays."""
    quotas = _quotas(
        queued=max_queued_jobs, running=max_running_jobs, gpu=max_gpu_time, stored=max_stored, priority=max_priority
    )
    body: dict[str, Any] = {"quotas": quotas}
    if name is not None:
        body["name"] = name
    with session.connect() as client:
        _show(client.post(f"{ORGANIZATIONS}/{organization_id}", body), session)


@app.command("get")
@with_session
def get_organization(organization_id: OrganizationId, *, session: Session) -> None:
    """Show one organization."""
    with session.connect() as client:
        _show(client.get(f"{ORGANIZATIONS}/{organization_id}"), session)


@app.command("delete")
@with_session
def delete_organization(organization_id: OrganizationId, *, session: Session) -> None:
    """Remove an organization that owns nothing; its id is printed."""
    with session.connect() as client:
        result = client.delete(f"{ORGANIZATIONS}/{organization_id}")
    if session.is_json:
        write_json(result)
    else:
        typer.echo(result["id"])


@app.command("key")
@with_session
def create_first_key(
    organization_id: OrganizationId,
    *,
    name: Annotated[str, typer.Option(help="What it is called.")] = "admin",
    session: Session,
) -> None:
    """Make a key that administers an organization; its value is printed, and cannot be shown again."""
    with session.connect() as client:
        key = client.post(f"{ORGANIZATIONS}/{organization_id}/admin_api_keys", {"name": name})
    show_new_key(key, session)


@app.command("usage")
@with_session
def show_usage(
    organization_id: Annotated[
        str | None, typer.Argument(metavar="[ORGANIZATION_ID]", help="Your own if none is named.")
    ] = None,
    *,
    session: Session,
) -> None:
    """Show what an organization uses, and may use."""
    path = f"{ORGANIZATIONS}/{organization_id}/usage" if organization_id else "/organization/usage"
    with session.connect() as client:
        usage = client.get(path)
    if session.is_json:
        write_json(usage)
        return
    stored = usage["stored_bytes"]
    write_fields(
        [
            ("organization", usage["organization_id"]),
            ("queued jobs", _of(usage["queued_jobs"], format_number)),
            ("running jobs", _of(usage["running_jobs"], format_number)),
            ("GPU time, 30 days", _of(usage["gpu_seconds"], format_seconds)),
            ("stored", _of(stored, format_bytes)),
            *((f"  {kind}", format_bytes(stored[kind])) for kind in ("files", "uploads", "models", "checkpoints")),
            ("highest priority", NONE if usage["max_priority"] is None else str(usage["max_priority"])),
        ]
    )


@projects.command("list")
@with_session
def list_projects(
    *,
    archived: Annotated[bool, typer.Option("--archived", help="Archived ones, too.")] = False,
    session: Session,
) -> None:
    """List the projects of your organization."""
    with session.connect() as client:
        page = client.list(PROJECTS, limit=ALL, query={"include_archived": "true" if archived else None})
    if session.is_json:
        write_json(page)
        return
    rows = [(item["id"], item["name"], item["status"], format_age(item["created_at"])) for item in page["data"]]
    write_table(("ID", "NAME", "STATUS", "CREATED"), rows)


@projects.command("create")
@with_session
def create_project(name: Name, *, session: Session) -> None:
    """Make a project; its id is printed."""
    with session.connect() as client:
        project = client.post(PROJECTS, {"name": name})
    if session.is_json:
        write_json(project)
    else:
        typer.echo(project["id"])


@projects.command("archive")
@with_session
def archive_project(project_id: ProjectId, *, session: Session) -> None:
    """Close a project for good and revoke its keys; its id is printed."""
    with session.connect() as client:
        project = client.post(f"{PROJECTS}/{project_id}/archive")
    if session.is_json:
        write_json(project)
    else:
        typer.echo(project["id"])


def _quotas(
    *, queued: str | None, running: str | None, gpu: str | None, stored: str | None, priority: str | None
) -> dict[str, int | None]:
    """Those that were given.

    Raises:
        UsageError: one is neither a quantity nor `none`.
    """
    given = (
        ("max_queued_jobs", queued, "--max-queued-jobs", parse_count),
        ("max_running_jobs", running, "--max-running-jobs", parse_count),
        ("max_gpu_seconds", gpu, "--max-gpu-time", parse_seconds),
        ("max_stored_bytes", stored, "--max-stored", parse_bytes),
        ("max_priority", priority, "--max-priority", parse_count),
    )
    return {
        name: None if value == NONE else parse(value, option=option)
        for name, value, option, parse in given
        if value is not None
    }


def _quota_cells(quotas: dict[str, Any]) -> list[str]:
    """The quotas of an organization, in the order of the list's columns."""
    formats = (
        ("max_queued_jobs", str),
        ("max_running_jobs", str),
        ("max_gpu_seconds", format_seconds),
        ("max_stored_bytes", format_bytes),
        ("max_priority", str),
    )
    return [NONE if quotas[name] is None else write(quotas[name]) for name, write in formats]


def _show(organization: dict[str, Any], session: Session) -> None:
    if session.is_json:
        write_json(organization)
        return
    names = ("queued jobs", "running jobs", "GPU time, 30 days", "stored", "priority")
    limits = [
        (f"at most, {name}", cell) for name, cell in zip(names, _quota_cells(organization["quotas"]), strict=True)
    ]
    write_fields([("id", organization["id"]), ("name", organization["name"]), *limits])


def _of(used: dict[str, Any], write: Any) -> str:
    """`3 of 5`; without a limit the figure alone."""
    limit = used["limit"]
    return str(write(used["used"])) if limit is None else f"{write(used['used'])} of {write(limit)}"
