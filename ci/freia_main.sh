#!/usr/bin/env bash
# Installs the pinned commit of FrEIA's main branch into .venv/freia-main, beside FrEIA 0.2.
# Benchmarks and tests then take its block instead of a stand-in. It needs git and its repository.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh

[ -x .venv/bin/python ] || {
    echo "ci/freia_main.sh: there is no .venv yet; run: make lint" >&2
    exit 1
}
rm -rf .venv/freia-main
install .venv "FrEIA's main branch, at its pinned commit" --no-deps --no-build-isolation \
    --use-pep517 --target .venv/freia-main -r ci/freia_main.txt
