#!/usr/bin/env bash
# Runs what `make test` stands for: style and types, the tests, the comparison with the real peers,
# and the Triton kernels without a GPU. It uses all cores.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh
export PYTHON=${PYTHON:-.venv/bin/python}
started=$SECONDS

echo "== lint" && ci/lint.sh
echo "== tests, those of the compiled kernels among them" && run_tests --durations=10 -m "not slow"
echo "== kernels, interpreted" && ci/kernels.sh interpreted
echo "== all passed in $((SECONDS - started)) s"
