"""The dashboard's files by themselves: what the content security policy and the house rules ask of them. No browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DASHBOARD = Path(__file__).parents[2] / "server" / "dashboard"
PAGES = sorted(DASHBOARD.glob("*.html"))
MODULES = sorted((DASHBOARD / "js").rglob("*.js"))
STYLES = sorted((DASHBOARD / "css").glob("*.css"))
MAX_LINES = 300

# Ways to turn text into markup or code; what others wrote must stay text.
_MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|dangerouslySet|\beval\(|new Function"
)
_INLINE = re.compile(r"<style|<script(?![^>]*\bsrc=)|\sstyle=|\son[a-z]+=", re.IGNORECASE)
_IMPORT = re.compile(r"""from '(\.[^']+)'|^import '(\.[^']+)'""", re.MULTILINE)


def _name(path: Path) -> str:
    return path.relative_to(DASHBOARD).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_a_page_has_no_inline_code_and_only_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert _INLINE.search(text) is None
    addresses = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert addresses
    for address in addresses:
        assert address.startswith("/assets/"), address
        assert (DASHBOARD / address.removeprefix("/assets/")).is_file(), address


def test_the_sign_in_page_has_the_place_for_its_sentence() -> None:
    assert (DASHBOARD / "login.html").read_text(encoding="utf-8").count("<!--error-->") == 1


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_is_short_introduces_itself_and_makes_no_markup_of_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("// ")
    assert text.count("\n") <= MAX_LINES
    assert _MARKUP.search(text) is None
    assert re.search(r'\sstyle="', text) is None
    for match in _IMPORT.finditer(text):
        target = path.parent / (match[1] or match[2])
        assert target.resolve().is_file(), f"{match[0]} of {_name(path)}"


@pytest.mark.parametrize("path", [*MODULES, *STYLES, *PAGES], ids=_name)
def test_nothing_is_asked_of_another_site(path: Path) -> None:
    assert re.search(r"""(['"(`])(https?:)?//[a-z]""", path.read_text(encoding="utf-8")) is None


def test_third_party_code_comes_with_its_licences_and_versions() -> None:
    table = (DASHBOARD / "vendor" / "README.md").read_text(encoding="utf-8")
    for path in (DASHBOARD / "vendor").iterdir():
        assert path.name == "README.md" or path.name in table, path.name
