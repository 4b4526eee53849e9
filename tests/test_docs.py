"""The examples of the pages and of the docstrings run, and print what they say.

A ``pycon`` block is a session whose output is compared, a ``python`` block runs; the blocks of a
page share their names. An HTML comment ``<!-- not run: reason -->`` in the line before a block
excuses it.
"""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from fastflow_kernels import route

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("fastflow_kernels", "reference")
    for path in (ROOT / folder).glob("*.py")
    # which needs Lightning: tests/ecosystem runs its example
    if ">>>" in path.read_text() and path.stem != "lightning"
)
BLOCK = re.compile(
    r"^(?P<excuse><!-- not run: [^\n]+ -->\n)?```(?P<kind>python|pycon)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str) -> list[tuple[str, int, str]]:
    """Kind, line number and code of every block that is to run."""
    return [
        (m["kind"], page[: m.start("code")].count("\n"), m["code"])
        for m in BLOCK.finditer(page)
        if not m["excuse"]
    ]


def run(page: str, name: str) -> int:
    """Run a page's blocks in order; returns how many there were."""
    names: dict = {"__name__": "__main__"}
    found = blocks(page)
    for kind, line, code in found:
        if kind == "python":
            exec(compile("\n" * line + code, name, "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(code, names, name, name, line)
        report: list[str] = []
        failed, attempted = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(
            test, out=report.append, clear_globs=False
        )
        names = test.globs
        assert attempted, f"{name}, line {line}: a session without a command"
        assert not failed, "".join(report)
    return len(found)


def page_of(path: Path) -> Any:
    uses_peers = any(
        re.search(r"\b(FrEIA|anomalib)\b", code) for _, _, code in blocks(path.read_text())
    )
    return pytest.param(
        path, id=str(path.relative_to(ROOT)), marks=[pytest.mark.peers] if uses_peers else []
    )


@pytest.mark.parametrize("path", [page_of(path) for path in PAGES if blocks(path.read_text())])
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


def test_readme_says_what_runs_where() -> None:
    """The tables of route.py, by which calls are decided, word by word."""
    page = (ROOT / "README.md").read_text()
    for cases in (route.WHAT_RUNS_WHERE, route.PERMUTATIONS):
        assert "\n".join(f"| {case.call} | {case.runs} |" for case in cases) in page
