#!/usr/bin/env bash
# The benchmarks. Arguments go to pytest and to bench/conftest.py's options; rows go to out/bench,
# or with --record to bench/results.
set -euo pipefail
cd "$(dirname "$0")/.."

columns=()
"${PYTHON:-.venv/bin/python}" -c 'import pytest_benchmark' 2>/dev/null &&
    columns=(--benchmark-columns=min,median,iqr,rounds)
exec "${PYTHON:-.venv/bin/python}" -m pytest bench/test_speed.py -q -p no:cacheprovider \
    ${columns[@]+"${columns[@]}"} "$@"
