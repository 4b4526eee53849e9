"""Count the words of every sentence in the pages, docstrings and comments of the project.

    python ci/prose.py [FILE ...]      # without files: all that the limits hold for

It names every file whose average is above the limit and every sentence that is too long, and exits
with 1 if there is one. Code, tables, headings, formulas and quotations do not count. Code within a
sentence counts as one word.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

AVERAGE = 16  # words a sentence, over a file
LONGEST = 35

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/TUNING.md", "docs/*.md")
CODE = ("fastflow_kernels", "reference", "bench", "ci", "docs", "tests")

FENCED = re.compile(r"^(`{3,}|\$\$).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# What starts a new piece of text: a list item, an argument's name in a docstring.
ITEM = re.compile(r"^\s*(?:[-*] |\d+\. |\w+(?: \([^)]*\))?: (?=\w)|>>> |\.\.\. )")
SECTION = re.compile(
    r"^(Args|Returns|Yields|Raises|Warns|Attributes|Shape|Example|Examples|Note):$"
)
NO_PROSE = re.compile(r"^\s*(?:#{1,6} |[|>]|!\[|\[[^]]+\]: |>>> |\.\.\. |[-=]{3,}$|:\w+:)")
END = re.compile(r"(?<=[.!?])[\"')\]*]*\s+(?=[\"'(\[*`]*[A-Z0-9`])")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|cf|etc|al)\.")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a Markdown text or a docstring."""
    for piece in _pieces(COMMENT.sub("", FENCED.sub("\n", text))):
        piece = re.sub(r"``[^`]+``|`[^`]+`|\$[^$]+\$", "`code`", piece)
        piece = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", piece)  # a link is its text
        yield from END.split(ABBREVIATION.sub(r"\1", piece))


def _pieces(text: str) -> Iterator[str]:
    """Yield paragraphs and list items, each on one line."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if lines and (not line.strip() or ITEM.match(line) or NO_PROSE.match(line)):
            yield " ".join(lines)
            lines = []
        if line.strip() and not NO_PROSE.match(line):
            lines.append(ITEM.sub("", line).strip())


def words(sentence: str) -> int:
    """Count the words that hold a letter or a digit."""
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def texts(path: Path) -> Iterator[str]:
    """Yield what a file says: a page whole, of code the docstrings and comments."""
    source = path.read_text()
    if path.suffix != ".py":
        yield source
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield without_literals(ast.get_docstring(node) or "")
    yield from _comments(source)


def without_literals(docstring: str) -> str:
    """Leave out formulas and sessions: what is indented without a section's name above it."""
    kept, in_section = [], False
    for line in docstring.splitlines():
        if line.strip() and not line.startswith(" "):
            in_section = bool(SECTION.match(line))
        is_prose = in_section or not line.startswith(" ")
        kept.append(line if is_prose and not SECTION.match(line) else "")
    return "\n".join(kept)


def _comments(source: str) -> Iterator[str]:
    """Yield runs of comments that stand below each other."""
    run: list[str] = []
    previous = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != previous + 1:
            yield "\n".join(run)
            run = []
        run.append(token.string.lstrip("# "))
        previous = token.start[0]
    yield "\n".join(run)


def check(path: Path) -> bool:
    """Print what is wrong with a file; return whether it keeps the limits."""
    counts = [(s, words(s)) for text in texts(path) for s in sentences(text) if words(s)]
    if not counts:
        return True
    average = sum(count for _, count in counts) / len(counts)
    too_long = [(s, count) for s, count in counts if count > LONGEST]
    if average <= AVERAGE and not too_long:
        return True
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"{name}: {average:.1f} words a sentence (at most {AVERAGE})")
    for sentence, count in too_long:
        print(f"    {count} words (at most {LONGEST}): {sentence}")
    return False


def main(files: list[str]) -> int:
    """Check the files, or all of the project's; return the exit status."""
    paths = [Path(file).resolve() for file in files] or [
        *(path for pattern in PAGES for path in sorted(ROOT.glob(pattern))),
        *(path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))),
    ]
    failed = [path for path in paths if not check(path)]
    print(f"prose: {len(paths) - len(failed)} of {len(paths)} files keep the limits")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
