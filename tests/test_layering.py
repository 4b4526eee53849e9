"""Test the layering of the sources: which files may import which, and what an import loads."""

from __future__ import annotations

import ast
import compileall
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fastflow_kernels"

# The layers of the package, lowest first: a file may import files in the lines above its own.
# engines/* is one entry. Only route.py may import engines/triton, because it decides the engine.
LAYERS = (
    ("errors", "dtypes", "coupling", "layouts", "stock", "freia", "torch_private"),
    ("backends", "predicates", "options"),
    ("engines", "channels"),
    ("permutations",),
    ("index_cache", "fork", "call"),
    ("checkpoints", "route", "steps", "coupling_forms"),
    ("fused", "replay", "drift", "seen"),
    ("block", "chain_steps"),
    ("sides", "runs"),
    ("reconstruct", "modules", "foreign_activation"),
    ("link", "probe", "coupling_blocks", "chain"),
    ("reversible", "probe_couplings"),
    ("sequence", "accelerated"),
    ("accelerated_couplings",),
    ("reporting",),
    ("patch",),
    ("lightning", "check", "__init__"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return every import of a file: its absolute dotted name, and whether it runs at once.

    ``import_module("name")`` counts as well. ``from package import name`` counts as package.name,
    because name may be a module. An import in a function runs later, and one under ``if
    TYPE_CHECKING`` never runs.
    """
    imported: list[tuple[str, bool]] = []
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            imported.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            imported.extend((".".join([*base, alias.name]), at_import) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and isinstance(node.args[0], ast.Constant)
        ):
            imported.append((node.args[0].value, at_import))
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            later = True
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not later)

    visit(ast.parse(path.read_text(), str(path)), True)
    return imported


def layer(dotted: str) -> str | None:
    """Return the layer that an import of the package belongs to, or None for other packages."""
    parts = dotted.split(".")
    if parts[0] != PACKAGE:
        return None
    name = parts[1] if len(parts) > 1 else "__init__"
    is_module = (ROOT / PACKAGE / name).is_dir() or (ROOT / PACKAGE / f"{name}.py").exists()
    # `from fastflow_kernels import AllInOneBlock` reads it from __init__.
    return name if is_module else "__init__"


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


TESTS_AND_BENCH = [*sources("tests"), *sources("bench")]
TEST_MODULES = {
    relative(path).removesuffix(".py").replace("/", ".")
    for path in TESTS_AND_BENCH
    if path.name.startswith("test_")
}


@pytest.mark.parametrize("path", TESTS_AND_BENCH, ids=relative)
def test_no_test_is_imported(path: Path) -> None:
    """Code that tests and benchmarks share is in tests/support."""
    for name, _ in imports(path):
        assert not {name, name.rpartition(".")[0]} & TEST_MODULES, (
            f"{relative(path)} imports {name}: move it to tests/support"
        )


@pytest.mark.parametrize("path", sources("reference"), ids=relative)
def test_reference_imports_torch_and_itself_only(path: Path) -> None:
    allowed = {"reference", "torch"} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name, _ in imports(path)} <= allowed


@pytest.mark.parametrize("path", sources(PACKAGE), ids=relative)
def test_package_imports_go_one_way(path: Path) -> None:
    own = layer_of(path)
    assert own in LEVEL, f"{relative(path)} belongs to no layer: give it a place in LAYERS"
    for name, _ in imports(path):
        target = layer(name)
        if target is not None and target != own:
            assert LEVEL[target] < LEVEL[own], (
                f"{relative(path)} imports {name}, which is not in a line above {own} in LAYERS"
            )
        if name.startswith(f"{PACKAGE}.engines.triton"):
            assert own in ("engines", "route"), (
                f"{relative(path)} imports {name}: only route.py may"
            )


def layer_of(path: Path) -> str:
    inside = path.relative_to(ROOT / PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


@pytest.mark.parametrize("path", [*sources(PACKAGE), *sources("bench")], ids=relative)
def test_files_are_short_and_functions_take_few_arguments(path: Path) -> None:
    """A file has at most 400 lines, and a function at most six parameters.

    Constructors and methods with another library's signature may take more. So may kernels and
    their helpers, whose parameters are pointers, sizes and constants.
    """
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "forward"):
            arguments = node.args
            names = [
                a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            ]
            is_kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            assert is_kernel or len([n for n in names if n not in ("self", "cls")]) <= 6, node.name


@pytest.mark.parametrize("path", [*sources(PACKAGE), *sources("bench")], ids=relative)
def test_private_names_stay_in_their_file(path: Path) -> None:
    tree = ast.parse(path.read_text())
    modules = {name.rpartition(".")[2] for name, _ in imports(path) if layer(name) is not None}
    for name, _ in imports(path):
        last = name.rpartition(".")[2]
        assert layer(name) is None or not last.startswith("_") or last.startswith("__"), name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert node.value.id not in modules or not is_private, f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=relative)
def test_private_names_of_torch_stand_in_one_file(path: Path) -> None:
    """That file is torch_private.py, whose tests check the names with every supported version."""
    if path.name == "torch_private.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert not re.match(r"torch(\.\w+)*\._[a-zA-Z]", dotted), dotted
            assert node.attr not in ("_version", "_compiled_call_impl", "_cdata"), dotted


@pytest.mark.parametrize("path", sources(PACKAGE), ids=relative)
def test_package_imports_nothing_foreign(path: Path) -> None:
    in_kernels = path.parent.name == "triton"
    for name, at_import in imports(path):
        top = name.split(".")[0]
        assert top not in ("reference", "tests", "bench", "anomalib"), (
            f"{relative(path)} imports {name}"
        )
        assert top not in ("scipy", "numpy"), f"{relative(path)} imports {name}"
        assert top != "lightning" or path.name == "lightning.py", f"{relative(path)} imports {name}"
        if top in ("triton", "FrEIA"):
            assert not at_import or (top == "triton" and in_kernels), (
                f"{relative(path)} imports {name} when it is imported"
            )
        is_plan = name.startswith(f"{PACKAGE}.engines.triton.plan")  # imports no Triton
        if name.startswith(f"{PACKAGE}.engines.triton") and not in_kernels and not is_plan:
            assert not at_import, (
                f"{relative(path)} imports {name} when it is imported, and with it Triton"
            )


@functools.cache
def loaded_after(statement: str) -> set[str]:
    """Return the top-level modules in sys.modules of a fresh interpreter after a statement."""
    code = (
        f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", [PACKAGE, "reference"])
def test_import_pulls_in_nothing_but_torch(name: str) -> None:
    extra = loaded_after(f"import {name}") - loaded_after("import torch")
    assert extra <= {name} | set(sys.stdlib_module_names), (
        f"importing {name} also imports {sorted(extra)}"
    )


NO_DEVICE = f"""
import torch

def asked(*args, **kwargs):
    raise AssertionError("importing the package asks for a device")

for module in (torch.cuda, torch.accelerator, torch.mps, torch.xpu):
    for name in (
        "is_available", "device_count", "current_device", "get_device_name",
        "get_device_properties", "_lazy_init", "init",
    ):
        setattr(module, name, asked)
import {PACKAGE}
assert not torch.cuda.is_initialized()
"""


def test_import_asks_no_device() -> None:
    subprocess.run([sys.executable, "-c", NO_DEVICE], cwd=ROOT, check=True)


def test_import_takes_little_time_beside_that_of_torch() -> None:
    """The import takes at most a tenth of torch's.

    The shortest of three runs counts, because the machine may be busy. Garbage collection is off,
    because it may happen in either import.
    """
    compileall.compile_dir(ROOT / PACKAGE, quiet=1)  # as in an installed package

    def seconds() -> tuple[float, float]:
        command = [
            sys.executable,
            "-X",
            "importtime",
            "-c",
            f"import gc; gc.disable(); import torch, {PACKAGE}",
        ]
        report = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stderr
        lines = [
            line.removeprefix("import time:").split("|")
            for line in report.splitlines()
            if line.startswith("import time:")
        ]
        times = {
            name.strip(): int(cumulative) / 1e6
            for _, cumulative, name in lines
            if name.strip() in ("torch", PACKAGE)
        }
        return times[PACKAGE], times["torch"]

    own, of_torch = min(seconds() for _ in range(3))
    assert own <= 0.1 * of_torch, f"importing the package takes {own:.3f} s, torch {of_torch:.3f} s"


def test_the_reader_of_imports_sees_what_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / PACKAGE / "engines" / "one.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import triton.language as tl\nfrom .. import modules\n"
        "from ..route import choose_route\nfrom fastflow_kernels import errors\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\n"
        "class A:\n    import scipy.stats\ndef f():\n    import FrEIA\n"
        "    importlib.import_module('fastflow_kernels.patch')\n"
    )
    assert imports(path) == [
        ("triton.language", True),
        ("fastflow_kernels.modules", True),
        ("fastflow_kernels.route.choose_route", True),
        ("fastflow_kernels.errors", True),
        ("typing.TYPE_CHECKING", True),
        ("numpy", False),
        ("scipy.stats", True),
        ("FrEIA", False),
        ("fastflow_kernels.patch", False),
    ]
    for name in ("modules", "route", "errors"):
        (tmp_path / PACKAGE / f"{name}.py").touch()
    assert [layer(name) for name, _ in imports(path)][1:4] == ["modules", "route", "errors"]
    assert layer("fastflow_kernels.AllInOneBlock") == "__init__"
    assert layer("fastflow_kernels") == "__init__"
    assert layer("torch.nn") is None
