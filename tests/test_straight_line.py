"""Test that the sources show the path of x from a block's call to a launcher.

The test follows the calls of forward, backward, inverse and reversible chains. Each must name a
function, a class or a method. Readers, editors and type checkers lose calls through a variable.

A method of an engine is followed in every engine. Methods of other values are followed for ``self``
and for arguments, whose annotations say where they are. Decorators are not followed.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from fastflow_kernels.engines import ChainEngine, Engine, eager
from fastflow_kernels.engines.pixels import ByPixels

Place = tuple[str, str]  # module, and function or Class.method
PREFIX = "fastflow_kernels."
PACKAGE = Path(__file__).resolve().parent.parent / "fastflow_kernels"
ENGINE = [name for name in vars(Engine) if not name.startswith("_")]
# What an engine has beside that for the blocks of a chain; one that wraps an engine has it not.
CHAIN_ENGINE = [name for name in vars(ChainEngine) if not name.startswith("_")]
ENGINES = ("engines.eager", "engines.triton.engine")
PIXELS = ("engines.pixels", "ByPixels")  # an engine that wraps one of them
# Fields of ``Prepared`` that hold a Launch.
LAUNCHES = {"launch", "finish", "gin_sums"}
LAUNCHER = ("engines.triton.launch", "Launch.__call__")
# What the user brings: a subnet is called by its name in the block's call, and a module of a chain
# that is not evaluated together with others is called as it is.
USERS = {"subnet", "module"}
# An argument whose calls count where it is made, as a lambda or by partial.
ARGUMENTS = {"compute"}
STARTS = [
    ("modules", "FusedForward.forward"),
    ("chain", "FusedChain.forward"),
    ("chain_steps", "_CouplingInChain.backward"),
    ("fused", "_Coupling.backward"),
    ("sides", "_Parts.backward"),
    ("sides", "_Side.backward"),
    ("link", "Link.evaluate"),
    ("link", "_LinkedBlock.backward"),
    ("reconstruct", "reconstruct"),
]


class Source:
    """A file of the package: its functions and methods, and the targets of its imports."""

    def __init__(self, module: str) -> None:
        tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())
        self.functions: dict[str, ast.FunctionDef] = {}
        self.classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        # NAME = direct_apply(FUNCTION) is the forward of an autograd Function.
        self.applied: dict[str, str] = {}
        self.imported: dict[str, str] = {}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.ClassDef):
                methods = (n for n in node.body if isinstance(n, ast.FunctionDef))
                self.functions |= {f"{node.name}.{n.name}": n for n in methods}
            elif isinstance(node, ast.Assign) and "direct_apply" in ast.unparse(node.value):
                function = ast.unparse(node.value).split("(")[1].rstrip(")")
                self.applied[ast.unparse(node.targets[0])] = f"{function}.forward"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"


source = cache(Source)


def callees(module: str, name: str) -> tuple[set[Place], set[str]]:
    """Return the places in the package that a function calls, and the calls that are lost."""
    function = source(module).functions[name]
    body = [node for statement in function.body for node in ast.walk(statement)]
    local = {n.arg for n in (*ast.walk(function.args), *body) if isinstance(n, ast.arg)}
    local |= {n.id for n in body if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    arguments = (n for n in ast.walk(function.args) if isinstance(n, ast.arg) and n.annotation)
    types = {n.arg: ast.unparse(n.annotation) for n in arguments if n.annotation}
    known: set[Place] = set()
    lost: set[str] = set()
    for called in (one for node in body if isinstance(node, ast.Call) for one in choices(node)):
        places: list[Place] | None = None
        if isinstance(called, ast.Name) and called.id not in local - USERS - ARGUMENTS:
            places = named(module, called.id)
        elif isinstance(called, ast.Attribute):
            owner = ast.unparse(called.value)
            places = method_of(module, owner, called.attr)
            if places is not None:
                places += method_of_argument(module, types.get(owner, ""), called.attr)
        if places is None:
            lost.add(ast.unparse(called))
        else:
            known.update(places)
    return known, lost


def choices(call: ast.Call) -> list[ast.expr]:
    """Return what a call may call: both branches of an expression, and the function of a partial.

    A partial is called by whom it is passed to.
    """
    if isinstance(call.func, ast.IfExp):
        return [call.func.body, call.func.orelse]
    return call.args[:1] if ast.unparse(call.func) == "partial" else [call.func]


def named(module: str, name: str) -> list[Place] | None:
    """Return the places of a module's name, or None if it is not a function or a class."""
    here = source(module)
    if name in here.functions:
        return [(module, name)]
    if name in here.applied:
        return [(module, here.applied[name])]
    if name in here.imported:
        origin, _, name = here.imported[name].rpartition(".")
        is_ours = origin.startswith(PREFIX)
        return named(origin.removeprefix(PREFIX), name) if is_ours else []
    return [] if name in here.classes | USERS | ARGUMENTS or hasattr(builtins, name) else None


def method_of(module: str, owner: str, name: str) -> list[Place] | None:
    """Return the places that ``owner.name`` calls, or None if the call is lost.

    A method of a value other than ``self`` or an engine has no places.
    """
    here = source(module)
    imported = here.imported.get(owner, "").removeprefix(PREFIX)
    if imported and (PACKAGE / (imported.replace(".", "/") + ".py")).exists():
        return named(imported, name)
    if owner == "self":
        return [(module, place) for place in here.functions if place.endswith(f".{name}")]
    if owner.split(".")[-1] in ("engine", "_engine") and name in ENGINE + CHAIN_ENGINE:
        places = [place for engine in ENGINES for place in named(engine, name) or ()]
        if name in CHAIN_ENGINE:
            return places
        return [*places, (PIXELS[0], f"{PIXELS[1]}.{name}")]
    if owner in here.classes and name == "apply":
        return [(module, f"{owner}.forward")]
    if name in LAUNCHES:
        return [LAUNCHER]
    return None if name in callable_fields() - USERS else []


def method_of_argument(module: str, annotation: str, name: str) -> list[Place]:
    """Return the places of a method of an argument whose annotation names classes of ours."""
    places = []
    for cls in annotation.split(" | "):
        origin = source(module).imported.get(cls, f"{PREFIX}{module}.{cls}").removeprefix(PREFIX)
        home = origin.rpartition(".")[0]
        is_file = (PACKAGE / (home.replace(".", "/") + ".py")).is_file()
        if is_file and f"{cls}.{name}" in source(home).functions:
            places.append((home, f"{cls}.{name}"))
    return places


@cache
def callable_fields() -> set[str]:
    """Return the fields of the package's classes that hold a function."""
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    classes = [n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)]
    fields = [n for cls in classes for n in cls.body if isinstance(n, ast.AnnAssign)]
    return {ast.unparse(n.target) for n in fields if "Callable" in ast.unparse(n.annotation)}


def test_x_is_not_lost_on_its_way_to_a_launcher() -> None:
    reached: set[Place] = set()
    pending = list(STARTS)
    while pending:
        place = pending.pop()
        if place in reached:
            continue
        reached.add(place)
        if place == LAUNCHER:  # the rest is in Triton
            continue
        known, lost = callees(*place)
        assert not lost, f"{'.'.join(place)} calls {sorted(lost)}"
        pending += known
    assert LAUNCHER in reached
    assert LAUNCHER[1] in source(LAUNCHER[0]).functions
    assert {("engines.plain", "forward"), ("engines.plain", "invert_coupling")} <= reached
    assert {("sides", "_Side.forward"), ("sides", "_Output.write")} <= reached
    assert {("sides", "transform"), ("call", "side_coefficients")} <= reached
    assert {("engines.eager", name) for name in ENGINE + CHAIN_ENGINE} <= reached
    assert {(PIXELS[0], f"{PIXELS[1]}.{name}") for name in ENGINE} <= reached
    of_triton = {place for name in ENGINE + CHAIN_ENGINE for place in named(ENGINES[1], name) or ()}
    assert of_triton <= reached


def test_the_engines_have_the_functions_of_the_protocol() -> None:
    """Their parameters have the same names; mypy compares their types."""
    engines: list[ModuleType | Engine] = [eager, ByPixels(eager)]
    if importlib.util.find_spec("triton") is not None:
        engines.append(importlib.import_module("fastflow_kernels.engines.triton.engine"))
    assert (len(ENGINE), len(CHAIN_ENGINE)) == (5, 4)
    for name in ENGINE + CHAIN_ENGINE:
        method = getattr(ChainEngine, name)
        expected = [p for p in inspect.signature(method).parameters if p != "self"]
        for engine in engines:
            if name in CHAIN_ENGINE and isinstance(engine, ByPixels):
                continue
            assert list(inspect.signature(getattr(engine, name)).parameters) == expected


def test_the_walk_notices_what_it_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "seen_by_walk.py").write_text("def forward(x): ...\n")
    (tmp_path / "lost.py").write_text(
        "from fastflow_kernels import seen_by_walk\n"
        "from fastflow_kernels.seen_by_walk import forward as imported\n"
        "TABLE = [imported]\n"
        "alias = TABLE[0]\n"
        "def forward(x, run, prepared, value: Value | None):\n"
        "    direction = seen_by_walk.forward if x else run\n"
        "    local = lambda y: y\n"
        "    x.add_(1).clone(), prepared.launch(x), seen_by_walk.forward(x), imported(x), len(x)\n"
        "    direction(x), run(x), local(x), alias(x), x.action(x)\n"
        "    TABLE[0](x), getattr(x, 'run')(x), (lambda y: y)(x)\n"
        "    value.write(x), (len if x else imported)(x), partial(local, x), partial(imported, x)\n"
        "class Value:\n"
        "    action: Callable[[], None]\n"
        "    def write(self, x): ...\n"
    )
    callable_fields.cache_clear()
    try:
        known, lost = callees("lost", "forward")
    finally:
        callable_fields.cache_clear()
    assert known == {LAUNCHER, ("seen_by_walk", "forward"), ("lost", "Value.write")}
    assert lost == {
        "direction", "run", "local", "alias", "x.action",
        "TABLE[0]", "getattr(x, 'run')", "lambda y: y",
    }  # fmt: skip
