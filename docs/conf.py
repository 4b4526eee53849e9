"""Sphinx's settings: Markdown pages (MyST), an API from Google-style docstrings, the furo theme.

``make docs`` builds the site.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fastflow_kernels  # noqa: E402
from fastflow_kernels import route  # noqa: E402

project = "fastflow_kernels"
author = copyright = "The fastflow_kernels authors"
version = release = fastflow_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["build", "requirements.txt", "generated/performance"]
myst_enable_extensions = ["dollarmath", "deflist", "substitution"]
myst_heading_anchors = 3


def _case_table(head: str, cases: tuple[route.Case, ...]) -> str:
    """Return the Markdown table of the cases by which route.py decides."""
    lines = [f"| {head} | what runs |", "|---|---|"]
    return "\n".join([*lines, *(f"| {case.call} | {case.runs} |" for case in cases)])


myst_substitutions = {
    "what_runs_where": _case_table("call", route.WHAT_RUNS_WHERE),
    "permutations": _case_table("permutation", route.PERMUTATIONS),
}

autodoc_mock_imports = ["lightning"]  # make docs does not install it
autodoc_typehints = "none"  # the signature has them, and the docstrings say shapes
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Shape"]
python_maximum_signature_line_length = 100
nitpicky = True
nitpick_ignore_regex = [
    # base classes that blocks and accelerated blocks share
    (
        "py:class",
        r"fastflow_kernels\.(reversible\.ReversibleChain|steps\.\w+|modules\.FusedForward)",
    ),
    ("py:class", r"(torch|collections|nn|typing)\..*|Tensor|Path|optional"),
    ("py:.*", r"FrEIA\..*|(fastflow_kernels\.)?(block|call|coupling|engines)\..*"),
]

html_theme = "furo"
html_title = "fastflow_kernels"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"


def _escape_stars(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape the star of ``(B, C, *S)``, which would start emphasis.

    Examples, formulas after "::" and text in double backquotes stay as they are.
    """
    is_formula = False
    for i, line in enumerate(lines):
        is_formula = (is_formula and line[:1] in ("", " ")) or line.endswith("::")
        if not is_formula and not line.lstrip().startswith((">>>", "...")):
            parts = line.split("``")
            parts[::2] = [re.sub(r"(?<![\w*\\])\*(?=\w)", r"\\*", part) for part in parts[::2]]
            lines[i] = "``".join(parts)


def _qualify_classes(app, what, name, obj, options, lines: list[str]) -> None:
    """Complete references to classes of the docstring's file that the package does not export."""
    module = getattr(obj, "__module__", None)
    own = vars(sys.modules[module]) if module in sys.modules else {}

    def complete(match: re.Match[str]) -> str:
        is_own = match[1] in own and not hasattr(fastflow_kernels, match[1])
        return f":class:`~{module}.{match[1]}`" if is_own else match[0]

    lines[:] = [re.sub(r":class:`(\w+)`", complete, line) for line in lines]


def _takes_own_arguments(cls: type) -> bool:
    own = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return own.__module__.startswith("fastflow_kernels")


def _constructor(app, what, name, obj, options, signature, returns) -> tuple[str, str] | None:
    """Return a class's signature from its ``__init__``: our ``__new__`` takes anything."""
    if what != "class" or not _takes_own_arguments(obj):
        return None
    own = inspect.signature(obj.__init__)
    parameters = [p.replace(annotation=p.empty) for p in list(own.parameters.values())[1:]]
    return str(own.replace(parameters=parameters, return_annotation=own.empty)), returns


def _inline(translator, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _display(translator, node: nodes.math_block) -> None:
    latex = node.astext().strip()
    if "&" in latex and "\\begin" not in latex:
        latex = rf"\begin{{split}} {latex} \end{{split}}"
    translator.body.append(f'<div class="math">{convert(latex, display="block")}</div>')
    raise nodes.SkipNode


def setup(app) -> None:
    """Render formulas as MathML: browsers draw it themselves, and pages load nothing."""
    app.connect("autodoc-process-docstring", _escape_stars, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _qualify_classes)
    app.connect("autodoc-process-signature", _constructor)
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
