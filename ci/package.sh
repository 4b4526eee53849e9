#!/usr/bin/env bash
# Builds the source distribution and the wheel, and checks their contents. Runs tests from the
# source distribution. Installs the wheel into an empty environment and uses it there.
# It works in a temporary folder and publishes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$root/.venv/bin/python
started=$SECONDS
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install=(-m pip install -qq --disable-pip-version-check --no-compile -c "$root/constraints.txt")

echo "== build"
# Build from a copy of the files that git tracks or would add. Otherwise ignored files, and those
# that an old egg-info lists, would end up in the package.
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$work/source"
"$python" -m venv "$work/tools"
"$work/tools/bin/python" "${install[@]}" -r ci/package.txt setuptools
NO_COLOR=1 "$work/tools/bin/python" -m build --no-isolation --outdir "$work/dist" "$work/source" \
    &>"$work/build.log" || { cat "$work/build.log" && exit 1; }
NO_COLOR=1 "$work/tools/bin/python" -m twine check --strict "$work"/dist/*
"$python" ci/package_contents.py "$work/source" "$work/dist"

echo "== tests, from the source distribution"
tar -xzf "$work"/dist/*.tar.gz -C "$work"
cd "$work"/fastflow_kernels-[0-9]*/
# Collecting shows that everything the tests import is there.
"$python" -m pytest -q -p no:cacheprovider --collect-only | tail -1
"$python" -m pytest -q -p no:cacheprovider tests/test_cli.py tests/test_docs.py

echo "== the wheel, in an empty environment"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" "${install[@]}" "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/python" -m fastflow_kernels info
"$work/venv/bin/python" -m fastflow_kernels check
"$work/venv/bin/python" "$root/ci/package_use.py" alone

echo "== the wheel's types, as another project sees them"
cat >uses.py <<'PY'
import torch
from fastflow_kernels import AllInOneBlock, Report, accelerate, report


def blocks(model: torch.nn.Module) -> tuple[str, ...]:
    found: Report = report(accelerate(model, backend="eager"))
    return tuple(entry.name for entry in found.changed)


block: torch.nn.Module = AllInOneBlock([(4,)], subnet_constructor=torch.nn.Linear)
PY
"$python" -m mypy --strict --no-incremental --python-executable "$work/venv/bin/python" uses.py

echo "== the wheel, beside FrEIA"
"$work/venv/bin/python" "${install[@]}" setuptools scipy
"$work/venv/bin/python" "${install[@]}" --no-deps --no-build-isolation --use-pep517 \
    -r "$root/ci/peers.txt"
"$work/venv/bin/python" "$root/ci/package_use.py" freia
echo "== the package is fine ($((SECONDS - started)) s)"
