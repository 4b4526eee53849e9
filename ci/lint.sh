#!/usr/bin/env bash
# Checks style and types: ruff's linter and formatter, and mypy. pyproject.toml has the settings.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" ci/prose.py
