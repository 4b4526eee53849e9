"""The way of x from ``AllInOneBlock.forward`` to a launcher can be read from the sources.

Every call on it names a function, a class, or a method of a typed value: nothing is called through
a variable that a reader, an editor or a type checker would lose.
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

from fastflow_kernels.engines import Engine, eager

PACKAGE = Path(__file__).resolve().parent.parent / "fastflow_kernels"
ENGINE = [name for name in vars(Engine) if not name.startswith("_")]
# What is the user's: a subnet is called by the name that the block's call gives it.
USERS = {"subnet"}


class Source:
    """A file of the package: its functions and methods, and what its imports stand for."""

    def __init__(self, module: str) -> None:
        path = PACKAGE / (module.replace(".", "/") + ".py")
        tree = ast.parse(path.read_text())
        self.functions: dict[str, ast.FunctionDef] = {}
        self.classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
        # NAME = direct_apply(FUNCTION): the forward of an autograd Function
        self.applied = {
            node.targets[0].id
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and "direct_apply" in ast.unparse(node.value)
        }
        self.imported: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastflow"):
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def is_module(self, name: str) -> bool:
        dotted = self.imported.get(name, "").removeprefix("fastflow_kernels.")
        return bool(dotted) and (PACKAGE / (dotted.replace(".", "/") + ".py")).exists()


source = cache(Source)


def callees(module: str, name: str) -> tuple[set[tuple[str, str]], set[str], set[str]]:
    """What a function calls: functions of the package, methods of an engine, and variables."""
    here = source(module)
    function = here.functions[name]
    known: set[tuple[str, str]] = set()
    of_engine: set[str] = set()
    variables: set[str] = set()
    arguments = [*function.args.args, *function.args.kwonlyargs]
    engines = {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "Engine"}
    local = {a.arg for a in arguments}
    body = [node for statement in function.body for node in ast.walk(statement)]
    for node in body:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            local.add(node.id)
    for node in body:
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name):
            if called.id in local:
                variables |= {called.id} - USERS
            elif called.id in here.imported and not here.is_module(called.id):
                where, _, what = here.imported[called.id].rpartition(".")
                known.add((where.removeprefix("fastflow_kernels."), what))
            elif called.id in here.functions:
                known.add((module, called.id))
            elif called.id in here.applied:
                known.add((module, "forward"))
            elif called.id not in here.classes and not hasattr(builtins, called.id):
                variables.add(called.id)
        elif isinstance(called, ast.Attribute) and ast.unparse(called.value).endswith(".engine"):
            of_engine.add(called.attr)
        elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            owner = called.value.id
            if owner in engines:
                of_engine.add(called.attr)
            elif here.is_module(owner):
                known.add((here.imported[owner].removeprefix("fastflow_kernels."), called.attr))
            elif owner == "self" and called.attr in here.functions:
                known.add((module, called.attr))
    return known, of_engine, variables


def test_x_is_not_lost_on_its_way_to_a_launcher() -> None:
    reached: set[tuple[str, str]] = set()
    engine_methods: set[str] = set()
    pending = [("modules", "forward")]
    while pending:
        place = pending.pop()
        module, name = place
        if place in reached or not (PACKAGE / (module.replace(".", "/") + ".py")).exists():
            continue
        reached.add(place)
        if name not in source(module).functions:  # a class, which holds values
            continue
        known, of_engine, variables = callees(module, name)
        assert not variables, f"{module}.{name} calls what {sorted(variables)} stand for"
        engine_methods |= of_engine
        pending += known
    assert ("engines.plain", "forward") in reached
    assert ("engines.plain", "invert_coupling") in reached
    assert {"forward", "invert_passive", "invert_active"} <= engine_methods


def test_both_engines_have_the_functions_of_the_protocol() -> None:
    """With its arguments; mypy compares their types."""
    engines: list[ModuleType] = [eager]
    if importlib.util.find_spec("triton") is not None:
        engines.append(importlib.import_module("fastflow_kernels.engines.triton.engine"))
    assert len(ENGINE) == 6
    for name in ENGINE:
        expected = [p for p in inspect.signature(getattr(Engine, name)).parameters if p != "self"]
        for engine in engines:
            assert list(inspect.signature(getattr(engine, name)).parameters) == expected


def test_the_walk_notices_what_it_looks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "plain.py").touch()
    (tmp_path / "lost.py").write_text(
        "from fastflow_kernels.engines import plain\n"
        "def forward(x, run, engine: Engine):\n"
        "    direction = plain.forward if x else run\n"
        "    return direction(run(x), engine.forward(x), plain.forward(x))\n"
    )
    known, of_engine, variables = callees("lost", "forward")
    assert known == {("engines.plain", "forward")}
    assert (of_engine, variables) == ({"forward"}, {"direction", "run"})
