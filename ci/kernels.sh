#!/usr/bin/env bash
# The Triton kernels on a machine without a GPU: run in Triton's interpreter, then compiled for several GPUs and inspected.
# Two processes, since Triton reads TRITON_INTERPRET once, when it is imported.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

if ! "$python" -c 'import triton'; then
    case "$(uname -sm)" in
    "Linux x86_64" | "Linux aarch64") echo "ci/kernels.sh: Triton should be installed here and is not; run: make clean test" >&2 && exit 1 ;;
    *) echo "ci/kernels.sh: there is no Triton for $(uname -sm): the kernels were NOT tested" && exit 0 ;;
    esac
fi

TRITON_INTERPRET=1 "$python" -m pytest -q --durations=5 tests/test_kernels.py
"$python" -m pytest -q --durations=5 tests/test_kernels_compiled.py tests/test_bench_compiled.py
