#!/usr/bin/env bash
# The Triton kernels on a machine without a GPU: run in Triton's interpreter; then compiled and executed on the CPU, and compiled for
# several GPUs and inspected. Two processes, because Triton reads TRITON_INTERPRET once, when it is imported.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "ci/kernels.sh: there is no $python; run: make lint" >&2 && exit 1; }

if ! "$python" -c 'import triton'; then
    case "$(uname -sm)" in
    "Linux x86_64" | "Linux aarch64") echo "ci/kernels.sh: Triton should be installed here and is not; run: make clean test" >&2 && exit 1 ;;
    *) echo "ci/kernels.sh: there is no Triton for $(uname -sm): the kernels were NOT tested" && exit 0 ;;
    esac
fi

TRITON_INTERPRET=1 "$python" -m pytest -q --durations=5 -m "not slow" tests/test_kernels*.py
"$python" -m pytest -q --durations=5 -m "kernels and not slow"
