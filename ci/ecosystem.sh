#!/usr/bin/env bash
# Runs the tests with real models of anomalib, FrEIA, Lightning, exporters and their run-times
# (tests/ecosystem). Their environment, .venv-ecosystem, adds pinned packages to those of .venv.
# Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh
venv=.venv-ecosystem

if ! [ "$venv/.stamp" -nt ci/ecosystem.txt ] || ! [ "$venv/.stamp" -nt .venv/.stamp ]; then
    command -v g++ >/dev/null ||
        echo "ci/ecosystem.sh: g++ is missing, which tests of torch.compile need" >&2
    make_venv_upon_ours "$venv"
    install "$venv" "anomalib, FrEIA, Lightning, ONNX, OpenVINO" --no-deps -r ci/ecosystem.txt
    "$venv/bin/python" -m pip check
    touch "$venv/.stamp"
fi

export HF_HUB_OFFLINE=1 PYTHON=$venv/bin/python
run_tests tests/ecosystem --durations=10 "$@"
# Triton reads the variable only once, when it is imported.
echo "== compiled models that call the kernels, interpreted"
TRITON_INTERPRET=1 run_tests tests/ecosystem/test_compile_operators.py "$@"
