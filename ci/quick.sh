#!/usr/bin/env bash
# Finds most faults in a minute: checks style, types and imports, and compares the block with the
# reference. Runs the kernels on small shapes in Triton's interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh
export PYTHON=${PYTHON:-.venv/bin/python}
started=$SECONDS

echo "== lint" && ci/lint.sh
echo "== imports and parity"
# One shape in all options, directions and layouts, in float32 and half precision. None of its sizes
# is a power of two.
parity="B2-C7 and (fp32 or fp16 or bf16 or layout) and not kernels"
run_tests -k "test_layering and not takes_little_time or $parity" \
    tests/test_layering.py tests/test_parity.py
echo "== kernels, interpreted" && ci/kernels.sh interpreted -k "coupling_parity and not of"
echo "== all passed in $((SECONDS - started)) s; make test runs the rest"
