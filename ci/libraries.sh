#!/usr/bin/env bash
# Times our block against other flow libraries on one CPU thread, in 3 minutes. The environment,
# .venv-libraries, adds pinned packages to those of .venv. Arguments are passed to
# bench/libraries.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh
venv=.venv-libraries

if ! [ "$venv/.stamp" -nt ci/libraries.txt ] || ! [ "$venv/.stamp" -nt .venv/.stamp ]; then
    make_venv_upon_ours "$venv"
    install "$venv" "zuko, normflows, nflows, without their dependencies" \
        --no-deps --no-build-isolation --use-pep517 -r ci/libraries.txt
    touch "$venv/.stamp"
fi

OMP_NUM_THREADS=1 "$venv/bin/python" -m bench.libraries "$@"
