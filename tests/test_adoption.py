"""Our classes count as FrEIA's once FrEIA is imported, whenever that is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.peers import freia

pytestmark = pytest.mark.usefixtures("fused")

ROOT = Path(__file__).resolve().parent.parent

# The parts of FrEIA's packages that matter here, as in its main branch. FrEIA 0.2 has the same
# names.
STUB = {
    "__init__.py": "from . import framework, modules",
    "modules/__init__.py": "from .base import *",
    "modules/base.py": """
import torch.nn as nn
class InvertibleModule(nn.Module):
    def __init__(self, dims_in, dims_c=None):
        super().__init__()
        self.dims_in, self.dims_c = dims_in, dims_c or []
""",
    "framework/__init__.py": "from .sequence_inn import *",
    "framework/sequence_inn.py": """
from FrEIA.modules import InvertibleModule
class SequenceINN(InvertibleModule):
    def __init__(self, *dims, force_tuple_output=False):
        super().__init__([dims])
    def forward(self, *args, **kwargs):
        raise AssertionError("not ours")
    append = __getitem__ = __setitem__ = __len__ = __iter__ = output_dims = forward
""",
}

MAKE = """
import copy, importlib, pickle, sys
import torch
from fastflow_kernels import AllInOneBlock, InvertibleModule, ReversibleSequence

def make():
    chain = ReversibleSequence(4)
    chain.append(AllInOneBlock, subnet_constructor=torch.nn.Linear)
    return chain

def check(chain):
    import FrEIA.framework, FrEIA.modules
    base, sequence = FrEIA.modules.InvertibleModule, FrEIA.framework.SequenceINN
    assert isinstance(chain[0], base) and isinstance(chain, base)
    assert isinstance(InvertibleModule([(4,)]), base)
    assert isinstance(chain, sequence) and not isinstance(chain[0], sequence)
    assert isinstance(chain[0], InvertibleModule) and isinstance(chain, ReversibleSequence)
    assert not isinstance(torch.nn.Linear(1, 1), InvertibleModule)
    z, log_det = chain(torch.ones(3, 4))
    (z.sum() - log_det.sum()).backward()
    assert torch.allclose(chain(z, rev=True)[0], torch.ones(3, 4), atol=1e-5)
    assert len(chain) == len(chain[0:1]) == len(list(chain)) == 1 and chain.output_dims() == [(4,)]
    for copied in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert isinstance(copied, sequence) and torch.equal(copied(torch.ones(3, 4))[0], z)

def waiting():
    finders = [(finder, type(finder).__module__) for finder in sys.meta_path]
    return [finder for finder, module in finders if module.startswith("fastflow_kernels")]
"""

SITUATIONS = {
    "built before": """
chain = make()
assert "FrEIA" not in sys.modules and len(waiting()) == 1
import FrEIA
assert not waiting()
check(chain)
check(make())
""",
    "imported before": """
for name in [name for name in sys.modules if name.startswith("fastflow_kernels")]:
    del sys.modules[name]
import FrEIA
from fastflow_kernels import AllInOneBlock, InvertibleModule, ReversibleSequence
assert all(type(finder) is not waiting for finder in sys.meta_path)
check(make())
""",
    "a part at a time": """
chain = make()
import FrEIA.modules.base
check(chain)
""",
    "a subclass": """
class Own(ReversibleSequence):
    pass
class OwnBlock(AllInOneBlock):
    pass
chain = Own(4)
chain.append(OwnBlock, subnet_constructor=torch.nn.Linear)
import FrEIA
check(chain)
class Late(OwnBlock, FrEIA.modules.InvertibleModule):
    pass
assert isinstance(Late([(4,)], subnet_constructor=torch.nn.Linear), FrEIA.modules.InvertibleModule)
""",
    "reloaded": """
chain = make()
import FrEIA
for _ in range(2):
    importlib.reload(FrEIA.modules.base)
    importlib.reload(FrEIA.modules)
    importlib.reload(FrEIA.framework.sequence_inn)
    importlib.reload(FrEIA.framework)
    make()  # looks again
    check(chain)
""",
    "imported anew": """
chain = make()
import FrEIA
for name in [name for name in sys.modules if name.split(".")[0] == "FrEIA"]:
    del sys.modules[name]
import FrEIA
check(make())
check(chain)
""",
    "among other finders": """
import importlib.abc, importlib.util
class Nosy(importlib.abc.MetaPathFinder):
    seen = []
    def find_spec(self, name, path, target=None):
        self.seen.append(name)
class Wrapping(importlib.abc.MetaPathFinder):
    "A finder as of import hooks, which asks the others by the public function."
    busy = False
    def find_spec(self, name, path, target=None):
        if self.busy or not name.startswith("FrEIA"):
            return None
        self.busy = True
        spec = importlib.util.find_spec(name)
        self.busy = False
        return spec
chain = make()
sys.meta_path.append(Nosy())
sys.meta_path.insert(0, Nosy())
sys.meta_path.insert(0, Wrapping())
import FrEIA
check(chain)
assert "FrEIA.modules.base" in Nosy.seen and not waiting()
""",
    "loaders as without": """
import importlib.util, inspect
assert importlib.util.find_spec("FrEIA.modules.base").loader.get_code("FrEIA.modules.base")
import FrEIA
for module in (FrEIA.modules.base, FrEIA.framework.sequence_inn):
    assert type(module.__loader__) is type(module.__spec__.loader) is type(FrEIA.__loader__)
    assert "class" in inspect.getsource(module)
""",
}


# Each situation runs in a fork of a process that has imported torch and this package, because
# importing takes seconds.
RUN = """
import os, sys, traceback
failed = []
for name, (folder, code) in situations.items():
    pid = os.fork()
    if pid == 0:
        try:
            sys.path[:0] = [folder] if folder else []
            exec(code, globals())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        failed.append(name)
print("failed:", failed)
sys.exit(bool(failed))
"""


def run(situations: dict[str, tuple[str | None, str]]) -> None:
    code = f"{MAKE}\nsituations = {situations!r}\n{RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def write_package(folder: Path, files: dict[str, str]) -> str:
    """Write the files of a package FrEIA into a folder; return the folder, for sys.path."""
    for name, text in files.items():
        path = folder / "FrEIA" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def test_classes_are_adopted_whenever_freia_is_imported(tmp_path: Path) -> None:
    stub = write_package(tmp_path, STUB)
    run({name: (stub, code) for name, code in SITUATIONS.items()})


@pytest.mark.peers
def test_classes_are_adopted_by_the_real_one() -> None:
    freia()
    run(
        {
            name: (None, code)
            for name, code in SITUATIONS.items()
            if name not in ("reloaded", "loaders as without")
        }
    )


def test_another_module_of_that_name_does_no_harm(tmp_path: Path) -> None:
    """It fails to import, has no such class, or has one that is not a module."""
    code = """
chain = make()
try:
    import FrEIA.modules.base
except ImportError:
    pass
for chain in (make(), chain):
    chain(torch.ones(3, 4))
    assert isinstance(chain, torch.nn.Module)
"""
    bodies = [
        "raise ImportError('broken')",
        "",
        "InvertibleModule = 1",
        *(f"class InvertibleModule{base}:\n    pass" for base in ("", "(int)")),
    ]
    folders = [
        write_package(
            tmp_path / str(i),
            {"__init__.py": "", "modules/__init__.py": "", "modules/base.py": body},
        )
        for i, body in enumerate(bodies)
    ]
    run({body: (folder, code) for body, folder in zip(bodies, folders, strict=True)})
