#!/usr/bin/env bash
# Everything that `make test` proves: style, the tests, the Triton kernels without a GPU, and the comparison with the real peers.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-.venv/bin/python}
started=$SECONDS

echo "== lint" && ci/lint.sh
echo "== tests" && "$PYTHON" -m pytest -q --durations=5 -m "not peers and not kernels and not slow"
echo "== kernels" && ci/kernels.sh
echo "== peers" && "$PYTHON" -m pytest -q --durations=5 -m "peers and not slow"
echo "== all passed in $((SECONDS - started)) s"
