"""The examples of a Markdown page, and how they run.

A ``pycon`` block is a session whose output is compared. A ``python`` block runs. The blocks of a
page share their names. An HTML comment ``<!-- not run: reason -->`` in the line before a block
excuses it.
"""

from __future__ import annotations

import doctest
import re

BLOCK = re.compile(
    r"^(?P<excuse><!-- not run: [^\n]+ -->\n)?```(?P<kind>python|pycon)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str) -> list[tuple[str, int, str]]:
    """Return kind, line number and code of every block that must run."""
    return [
        (m["kind"], page[: m.start("code")].count("\n"), m["code"])
        for m in BLOCK.finditer(page)
        if not m["excuse"]
    ]


def run(page: str, name: str) -> int:
    """Run a page's blocks in order, and return their number."""
    names: dict = {"__name__": "__main__"}
    examples = blocks(page)
    for kind, line, code in examples:
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
    return len(examples)
