"""Test the counter of words (ci/prose.py): what is a sentence, what counts, and what fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prose", ROOT / "ci" / "prose.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counts(prose: ModuleType, text: str) -> list[int]:
    return [prose.words(sentence) for sentence in prose.sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two three. Four five!", [3, 2]),
        ("One two\nthree. `Code` starts one.", [3, 3]),
        ("It takes 0.5 s, e.g. here. Then it ends.", [6, 3]),
        ("Run `make test ARGS=x` now.", [3]),
        ("Text.\n\n```\ncode code code\n```\n\nMore text.", [1, 2]),
        ("# Heading of five words here\n\nText.", [1]),
        ("| a cell | another |\n|---|---|\n\nText.", [1]),
        ("> quoted words\n\nText.", [1]),
        ("- one item\n- another item here", [2, 3]),
        ("See [the other page](page.md) for it.", [6]),
        ("Formula $a + b + c$ here.", [3]),
        ("<!-- hidden words -->\nText.", [1]),
        ("It is issue\n#15 that asks.", [6]),
    ],
)
def test_sentences(prose: ModuleType, text: str, expected: list[int]) -> None:
    assert [count for count in counts(prose, text) if count] == expected


def test_code_has_docstrings_and_comments(prose: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module words."""\n\n'
        "# First line\n# second line.\n\n"
        'def f():\n    """Do it.\n\n        y = a + b\n\n'
        '    Args:\n        x: The thing.\n    """\n'
        '    return "no prose in a string"  # trailing\n'
    )
    sentences = [s for text in prose.texts(path) for s in prose.sentences(text)]
    assert sentences == [
        "Module words.",
        "Do it.",
        "The thing.",
        "First line second line.",
        "trailing",
    ]


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("Ten words " * 5 + "end.", True),
        ("Two words " * 18 + "end.", False),  # 37 in one
        (f"{'word ' * 19}end. " * 3, False),  # 20 on average
        (f"{'word ' * 14}end. " * 3, True),
    ],
)
def test_limits(
    prose: ModuleType, text: str, passes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.md"
    path.write_text(text.replace(". word", ". Word"))
    assert prose.main([str(path)]) == int(not passes)
    assert ("at most" in capsys.readouterr().out) == (not passes)


def test_every_page_and_all_code_is_counted(prose: ModuleType) -> None:
    pages = {path for pattern in prose.PAGES for path in ROOT.glob(pattern)}
    expected = {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench/TUNING.md"}
    assert pages == expected
    assert {"fastflow_kernels", "reference", "bench", "tests", "ci", "docs"} <= set(prose.CODE)
    assert (prose.AVERAGE, prose.LONGEST) == (16, 35)
