"""Check what the built distributions hold: ``python ci/package_contents.py SOURCE DIST``."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGE = "fastflow_kernels"


def main(source: Path, dist: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    expect(wheel.name.endswith("-py3-none-any.whl"), f"a pure-Python wheel, got {wheel.name}")
    tracked = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    tracked = {name for name in tracked if not name.startswith((".", "fastflow_kernels.egg-info/"))}

    files = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    (metadata,) = {name.split("/")[0] for name in files} - {PACKAGE}
    inside, wanted = (
        {name for name in names if name.startswith(f"{PACKAGE}/")} for names in (files, tracked)
    )
    expect(
        inside == wanted,
        f"the package as it is in the source; they differ in {sorted(inside ^ wanted)}",
    )
    expect(f"{PACKAGE}/py.typed" in inside, "py.typed in the wheel")
    expect(
        f"{metadata}/licenses/LICENSE" in files,
        f"the licence in the wheel, got {sorted(files - inside)}",
    )

    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if not name.startswith(f"{PACKAGE}.egg-info/")} - {
        "PKG-INFO",
        "setup.cfg",
    }
    expect(
        tracked <= names,
        "all files in the source distribution; missing, or left in the checkout: "
        f"{sorted(tracked - names)}",
    )
    expect(
        names <= tracked, f"nothing else in the source distribution, got {sorted(names - tracked)}"
    )
    print(f"{wheel.name}: {len(files)} files; {sdist.name}: {len(names)} files")


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"package: expected {what}")


main(Path(sys.argv[1]), Path(sys.argv[2]))
