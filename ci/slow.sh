#!/usr/bin/env bash
# The tests that `make test` leaves out: more compiled kernels executed, faults planted in the kernels, benchmarks run from end to end.
set -euo pipefail
cd "$(dirname "$0")/.."

exec "${PYTHON:-.venv/bin/python}" -m pytest -q --durations=5 -m slow "$@"
