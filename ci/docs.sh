#!/usr/bin/env bash
# Builds the documentation: the benchmark report from bench/results, then the site from docs/, the
# docstrings, CONTRIBUTING.md, CHANGELOG.md and TUNING.md. A warning is an error. `make test` runs the examples of the pages
# (tests/test_docs.py).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

"$python" -m pip install -qq --disable-pip-version-check -c constraints.txt \
    -r docs/requirements.txt
rm -rf docs/build docs/generated
"$python" -m bench report --out docs/generated
"$python" -m sphinx -W --keep-going -q -b html docs docs/build
echo "== docs/build/index.html"
