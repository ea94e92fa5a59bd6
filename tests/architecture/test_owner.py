"""Requests look at things as their caller may: a route hands down whose view it is, and never an organization alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What is the whole organization's, by a key of any of its projects, or an administrator's.
OF_ORGANIZATIONS = {"organization.py", "organizations.py"}
ROUTES = sorted(path for path in (ROOT / "server/routes").glob("*.py") if path.name not in OF_ORGANIZATIONS)
# What is stored counts for the organization (`jobs/quotas.py`).
ALLOWED = {"quotas.measure_models(organization_id=caller.organization_id)"}


def organizations_handed_down(source: str) -> set[str]:
    """Calls with an organization's id, without their other arguments."""
    return {
        f"{ast.unparse(call.func)}({keyword.arg}={ast.unparse(keyword.value)})"
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "organization_id" and ast.unparse(keyword.value) != "caller.view.organization_id"
    }


@pytest.mark.parametrize("path", ROUTES, ids=lambda path: path.name)
def test_routes_hand_down_an_owner(path: Path) -> None:
    assert organizations_handed_down(path.read_text(encoding="utf-8")) <= ALLOWED


def test_what_the_check_finds() -> None:
    source = "reads.get_job(db, organization_id=caller.organization_id, job_id=job_id)"
    assert organizations_handed_down(source) == {"reads.get_job(organization_id=caller.organization_id)"}
