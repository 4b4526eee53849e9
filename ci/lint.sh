#!/usr/bin/env bash
# Style and types: ruff's linter and formatter, mypy, with the settings in pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
