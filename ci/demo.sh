#!/usr/bin/env bash
# The demo: the same anomaly detector trained with the stock block and with this package. Arguments
# go to bench.texture_demo.
set -euo pipefail
cd "$(dirname "$0")/.."

exec "${PYTHON:-.venv/bin/python}" -m bench.texture_demo "$@"
