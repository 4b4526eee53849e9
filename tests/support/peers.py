"""The real peers, as PyPI ships them: FrEIA 0.2 and anomalib 2.7.0 (ci/peers.txt), installed
without their dependencies.

Importing anomalib as a package would ask for Lightning and much else, so its block is loaded from
its one file.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

VERSIONS = {"FrEIA": "0.2", "anomalib": "2.7.0"}
INSTALL = (
    "pip install --no-deps --no-build-isolation -r ci/peers.txt   "
    "(`make test` and `make demo` do it)"
)


class PeerMissing(ImportError):
    """A peer is not installed in the version that is compared with; the message names the command
    that installs it.
    """


@cache
def freia() -> ModuleType:
    """The package ``FrEIA``."""
    _distribution("FrEIA")
    import FrEIA.framework
    import FrEIA.modules

    return FrEIA


def freia_block() -> type:
    """FrEIA's ``AllInOneBlock``."""
    return freia().modules.AllInOneBlock


@cache
def anomalib_block() -> type:
    """anomalib's ``AllInOneBlock``, from its one file, under its own module name."""
    freia()  # the file takes its base class from there
    name = "anomalib.models.components.flow.all_in_one_block"
    path = _distribution("anomalib").locate_file(name.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(name, str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle looks for the class
    spec.loader.exec_module(module)
    return module.AllInOneBlock


@cache
def prepare_torchvision() -> torch.library.Library | None:
    """Let a CUDA build of torchvision, what PyPI has for Linux, be imported beside a CPU build of
    torch; to be called before.

    Its extension does not load there, and its import then misses two operators. No model that is
    compared calls them.
    """
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    if torch.version.cuda is not None or "+cu" not in (folder / "version.py").read_text():
        return None
    # kept by the cache: the operators go with it
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _distribution(name: str) -> metadata.Distribution:
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise PeerMissing(f"{name} {VERSIONS[name]} is not installed. Run: {INSTALL}") from None
    if found.version != VERSIONS[name]:
        raise PeerMissing(
            f"{name} is {found.version}, and {VERSIONS[name]} is what is compared with. Run: "
            f"{INSTALL}"
        )
    return found
