#!/usr/bin/env bash
# The tests with the real models: anomalib, FrEIA, Lightning, exporters and their run-times (tests/ecosystem). They have an environment of
# their own, .venv-ecosystem, with pinned versions: some 1.3 GB beside torch, made in a minute or two. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${PYTHON:-python3}
venv=.venv-ecosystem

if ! [ "$venv/.stamp" -nt ci/ecosystem.txt ] || ! [ "$venv/.stamp" -nt constraints.txt ]; then
    [ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
    quiet=()
    [ -t 1 ] || quiet=(-qq)
    install() {
        echo "[$venv] $1" && shift
        "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} "$@"
    }
    install "torch, as pinned" -c constraints.txt torch setuptools
    install "what constraints.txt pins" -c constraints.txt numpy pytest scikit-image matplotlib tqdm
    install "anomalib, FrEIA, Lightning, ONNX, OpenVINO" --no-deps -r ci/ecosystem.txt
    "$venv/bin/python" -m pip check
    touch "$venv/.stamp"
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
exec "$venv/bin/python" -m pytest tests/ecosystem -q --durations=10 -p no:cacheprovider "$@"
