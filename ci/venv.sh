#!/usr/bin/env bash
# Makes .venv in the checkout with the pinned dependencies, this package (editable), and the peers
# that the tests compare with.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh

base=${PYTHON:-python3}
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "ci/venv.sh: the pinned versions need Python 3.11 or newer, $base is" \
        "$("$base" -V 2>&1). Name another one: make PYTHON=python3.12" >&2
    exit 1
}
make_venv .venv "$base"

brings_triton='
import importlib.metadata, sys
sys.exit(not any(name.startswith("triton") for name in importlib.metadata.requires("torch")))'

install .venv "torch, as pinned (a few hundred MB the first time)" \
    -c constraints.txt torch setuptools
# CUDA builds of torch require the Triton that they were built with, so it is installed by now.
.venv/bin/python -c "$brings_triton" ||
    install .venv "Triton, where there is one for this platform" -c constraints.txt -r ci/triton.txt
install .venv "this package, with what the tests and the demo need" \
    -c constraints.txt --no-build-isolation -e '.[test,demo]'
install .venv "the exporters to ONNX and a run-time" --no-deps -r ci/exporters.txt
install .venv "the peers: FrEIA and anomalib, without their dependencies" \
    --no-deps --no-build-isolation --use-pep517 -r ci/peers.txt
