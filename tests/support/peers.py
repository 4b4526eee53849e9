"""The real peers from PyPI: FrEIA 0.2 and anomalib 2.7.0 (ci/peers.txt).

They are installed without their dependencies. Importing anomalib as a package needs Lightning and
much else, so its block is loaded from its single file.
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
    """A peer is not installed in the version to compare with.

    The message names the command that installs it.
    """


@cache
def freia() -> ModuleType:
    """Return the package ``FrEIA``."""
    _distribution("FrEIA")
    import FrEIA.framework
    import FrEIA.modules

    return FrEIA


def freia_block() -> type:
    """Return FrEIA's ``AllInOneBlock``."""
    return freia().modules.AllInOneBlock


@cache
def anomalib_block() -> type:
    """Return anomalib's ``AllInOneBlock``, loaded from its file under its own module name."""
    freia()  # the file imports its base class from FrEIA
    name = "anomalib.models.components.flow.all_in_one_block"
    path = _distribution("anomalib").locate_file(name.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(name, str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle looks for the class there
    spec.loader.exec_module(module)
    return module.AllInOneBlock


@cache
def prepare_torchvision() -> torch.library.Library | None:
    """Make a CUDA build of torchvision importable with a CPU build of torch.

    PyPI has CUDA builds for Linux. Call this before the import. Torchvision's extension does not
    load with a CPU build of torch, so two operators are missing, which no model under test calls.
    """
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    if torch.version.cuda is not None or "+cu" not in (folder / "version.py").read_text():
        return None
    # The cache keeps the library, because the operators vanish with it.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _distribution(name: str) -> metadata.Distribution:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise PeerMissing(f"{name} {VERSIONS[name]} is not installed. Run: {INSTALL}") from None
    if distribution.version != VERSIONS[name]:
        raise PeerMissing(
            f"{name} {VERSIONS[name]} is needed, but {distribution.version} is installed. Run: "
            f"{INSTALL}"
        )
    return distribution
