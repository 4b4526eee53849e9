"""The real peers, as PyPI ships them: FrEIA 0.2 and anomalib 2.7.0, installed without their dependencies (``ci/peers.txt``).

Importing anomalib as a package would pull in Lightning and much else, so its block is loaded from its one file.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib import metadata

INSTALL = "pip install --no-deps -r ci/peers.txt"


class PeerMissing(ImportError):
    """A peer is not installed; the message names the command that installs it."""


@cache
def freia_block() -> type:
    """FrEIA 0.2's AllInOneBlock."""
    try:
        from FrEIA.modules import AllInOneBlock
    except ImportError as error:
        raise PeerMissing(f"FrEIA is not installed: {INSTALL}") from error
    return AllInOneBlock


@cache
def anomalib_block() -> type:
    """anomalib 2.7.0's AllInOneBlock, loaded from its file under its own module name."""
    freia_block()  # its base class
    try:
        files = metadata.files("anomalib") or []
    except metadata.PackageNotFoundError as error:
        raise PeerMissing(f"anomalib is not installed: {INSTALL}") from error
    name = "anomalib.models.components.flow.all_in_one_block"
    path = next(file.locate() for file in files if str(file) == name.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its blocks can be pickled
    spec.loader.exec_module(module)
    return module.AllInOneBlock
