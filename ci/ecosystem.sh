#!/usr/bin/env bash
# The tests with the real models: anomalib, FrEIA, Lightning, exporters and their run-times (tests/ecosystem). They have an environment of
# their own, .venv-ecosystem, with pinned versions: some 1.3 GB beside torch, made in a minute or two. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh
base=${PYTHON:-python3}
venv=.venv-ecosystem

if ! [ "$venv/.stamp" -nt ci/ecosystem.txt ] || ! [ "$venv/.stamp" -nt constraints.txt ]; then
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "ci/ecosystem.sh: the pinned versions need Python 3.11 or newer, $base is $("$base" -V 2>&1)" >&2 && exit 1
    }
    command -v g++ >/dev/null || echo "ci/ecosystem.sh: there is no g++, which torch.compile asks for: those tests will fail" >&2
    make_venv "$venv" "$base"
    install "$venv" "torch, as pinned" -c constraints.txt torch setuptools
    install "$venv" "what constraints.txt pins" -c constraints.txt numpy pytest scikit-image matplotlib tqdm
    install "$venv" "anomalib, FrEIA, Lightning, ONNX, OpenVINO" --no-deps -r ci/ecosystem.txt
    "$venv/bin/python" -m pip check
    touch "$venv/.stamp"
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
exec "$venv/bin/python" -m pytest tests/ecosystem -q --durations=10 -p no:cacheprovider "$@"
