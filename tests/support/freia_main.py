"""The block of FrEIA's main branch, where ci/freia_main.sh has installed its pinned commit.

The branch has no release. Its package has the name of FrEIA 0.2, which the tests import too, so
only the block and its base class are loaded, under a name of their own.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.peers import PeerMissing

ROOT = Path(__file__).resolve().parent.parent.parent
REQUIREMENT = ROOT / "ci" / "freia_main.txt"
FOLDER = Path(sys.prefix) / "freia-main" / "FrEIA" / "modules"
BLOB = "3ad846e5f9395d98281c743d5001c37f2c921735"  # git's hash of the block's file in that commit


def commit() -> str:
    """Return the pinned commit, shortened as in the result rows."""
    return REQUIREMENT.read_text().strip().rsplit("@", 1)[1][:12]


@cache
def freia_main_block() -> Any:
    """Return the branch's ``AllInOneBlock``.

    Raises:
        PeerMissing: It is not installed, or not in the pinned commit; the message names the
            command.
    """
    if not FOLDER.is_dir():
        raise PeerMissing(f"FrEIA main is not installed in {FOLDER.parent}. Run: ci/freia_main.sh")
    source = (FOLDER / "all_in_one_block.py").read_bytes()
    if hashlib.sha1(b"blob %d\0" % len(source) + source).hexdigest() != BLOB:
        raise PeerMissing(
            f"FrEIA main in {FOLDER.parent} is not of commit {commit()}. Run: ci/freia_main.sh"
        )
    package: Any = ModuleType("freia_main_modules")
    package.__path__ = [str(FOLDER)]
    sys.modules[package.__name__] = package
    package.InvertibleModule = importlib.import_module("freia_main_modules.base").InvertibleModule
    return importlib.import_module("freia_main_modules.all_in_one_block").AllInOneBlock
