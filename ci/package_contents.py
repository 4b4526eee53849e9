"""Check the files in the built distributions: ``python ci/package_contents.py SOURCE DIST``.

SOURCE is a clean copy of the checkout. DIST is a folder with one wheel and one source distribution.
"""

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
    actual, expected = (
        {name for name in names if name.startswith(f"{PACKAGE}/")} for names in (files, tracked)
    )
    expect(
        actual == expected,
        f"the files of {PACKAGE} in the wheel, as in the source; missing: "
        f"{sorted(expected - actual)}; unexpected: {sorted(actual - expected)}",
    )
    expect(f"{PACKAGE}/py.typed" in actual, "py.typed in the wheel")
    expect(
        f"{metadata}/licenses/LICENSE" in files,
        f"the licence in the wheel, got {sorted(files - actual)}",
    )

    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if not name.startswith(f"{PACKAGE}.egg-info/")} - {
        "PKG-INFO",
        "setup.cfg",
    }
    expect(
        tracked <= names,
        "all files of the checkout in the source distribution; missing (or left over in the "
        f"checkout): {sorted(tracked - names)}",
    )
    expect(
        names <= tracked,
        f"no other files in the source distribution, got {sorted(names - tracked)}",
    )
    print(f"{wheel.name}: {len(files)} files; {sdist.name}: {len(names)} files")


def expect(condition: bool, expectation: str) -> None:
    if not condition:
        raise SystemExit(f"package: expected {expectation}")


main(Path(sys.argv[1]), Path(sys.argv[2]))
