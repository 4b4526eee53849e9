"""The real peers, from PyPI: FrEIA 0.2 and anomalib 2.7.0 (ci/peers.txt), installed without their dependencies."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from types import ModuleType

VERSIONS = {"FrEIA": "0.2", "anomalib": "2.7.0"}
INSTALL = "pip install --no-deps --no-build-isolation -r ci/peers.txt   (`make test` does it; it needs numpy, scipy and setuptools)"


def _distribution(name: str) -> importlib.metadata.Distribution:
    """The installed distribution, in the version that is compared with. The tests fail, and are not skipped, without it."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(f"{name} {VERSIONS[name]} is not installed. Run: {INSTALL}") from None
    if found.version != VERSIONS[name]:
        raise RuntimeError(f"{name} is {found.version}, these tests compare with {VERSIONS[name]}. Run: {INSTALL}")
    return found


@functools.cache
def freia() -> ModuleType:
    """The package ``FrEIA``."""
    _distribution("FrEIA")
    import FrEIA.framework
    import FrEIA.modules

    return FrEIA


def freia_block() -> type:
    """FrEIA's ``AllInOneBlock``."""
    return freia().modules.AllInOneBlock


@functools.cache
def anomalib_block() -> type:
    """anomalib's ``AllInOneBlock``, from its one file: importing the package would ask for lightning and much else."""
    freia()  # the file takes its base class from there
    path = _distribution("anomalib").locate_file("anomalib/models/components/flow/all_in_one_block.py")
    spec = importlib.util.spec_from_file_location("anomalib_all_in_one_block", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AllInOneBlock
