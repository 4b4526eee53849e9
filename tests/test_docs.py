"""The examples of the pages and of the docstrings run, and print what they say.

Those of docs/anomalib.md import anomalib: tests/ecosystem/test_examples.py.
"""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from bench import performance, records
from tests.support.pages import BLOCK, blocks, run

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = ROOT / "docs" / "anomalib.md"
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("fastflow_kernels", "reference")
    for path in (ROOT / folder).glob("*.py")
    # tests/ecosystem runs the example of this one, which needs Lightning
    if ">>>" in path.read_text() and path.stem != "lightning"
)


def page_of(path: Path) -> Any:
    uses_peers = any(
        re.search(r"\b(FrEIA|anomalib)\b", code) for _, _, code in blocks(path.read_text())
    )
    return pytest.param(
        path, id=str(path.relative_to(ROOT)), marks=[pytest.mark.peers] if uses_peers else []
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "path",
    [page_of(path) for path in PAGES if blocks(path.read_text()) and path != ELSEWHERE],
)
def test_examples_of_the_page_run(path: Path) -> None:
    assert run(path.read_text(), str(path))


def test_every_example_is_found() -> None:
    for path in PAGES:
        page = path.read_text()
        assert len(BLOCK.findall(page)) == len(re.findall(r"^```py", page, re.MULTILINE)), path
    assert blocks((ROOT / "README.md").read_text())


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings_run(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


def test_a_wrong_example_is_noticed() -> None:
    assert run("```python\na = 1\n```\ntext\n```pycon\n>>> a + 1\n2\n```\n", "page") == 2
    assert run("<!-- not run: it is wrong -->\n```python\nraise ValueError\n```\n", "page") == 0
    excused = "<!-- not run: it is wrong -->\n```python\nraise ValueError\n```\n"
    with pytest.raises(ZeroDivisionError):
        run(f"{excused}```python\n1 / 0\n```\n{excused}", "page")
    with pytest.raises(AssertionError):
        run("```pycon\n>>> 1 + 1\n3\n```\n", "page")
    with pytest.raises(ZeroDivisionError):
        run("```python\n1 / 0\n```\n", "page")


def test_headline_of_the_readme_is_measured() -> None:
    """The table of the first screen is the one that the newest recorded rows make."""
    rows = records.newest(records.read([records.RESULTS]))
    assert "\n".join(performance.headline(rows)) in (ROOT / "README.md").read_text()


def test_readme_fits_a_front_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_every_table_of_the_performance_page_is_made() -> None:
    pages = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    included = {name for page in pages for name in re.findall(r"performance/([\w-]+)\.md", page)}
    assert included == set(performance.TABLES)


def test_badges_say_what_the_project_requires() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    required = {
        "python": re.search(r'requires-python = ">=([\d.]+)"', project),
        "torch": re.search(r'"torch>=([\d.]+)"', project),
        "triton": re.search(r'"triton>=([\d.]+);', project),
        "license": re.search(r'license = "(\w+)"', project),
    }
    for name, match in required.items():
        assert match, name
        badge = (ROOT / f"docs/figures/badges/{name}.svg").read_text()
        assert f">{match[1]}" in badge, name


def test_release_has_one_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    citation, changes = (ROOT / "CITATION.cff").read_text(), (ROOT / "CHANGELOG.md").read_text()
    released = re.search(r"^date-released: (.+)$", citation, re.MULTILINE)
    assert released
    assert f"\nversion: {version[1]}\n" in citation
    assert f"## [{version[1]}] - {released[1]}\n" in changes
