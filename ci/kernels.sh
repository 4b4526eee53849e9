#!/usr/bin/env bash
# Tests the Triton kernels on a machine without a GPU, in two processes. Triton reads
# TRITON_INTERPRET only once, when it is imported.
#
#   ci/kernels.sh interpreted   run in Triton's interpreter
#   ci/kernels.sh compiled      compiled and executed on the CPU, compiled and inspected
#   ci/kernels.sh               both
#
# Further arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh
which=both
case "${1:-}" in interpreted | compiled) which=$1 && shift ;; esac
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || {
    echo "ci/kernels.sh: there is no $python; run: make lint" >&2 && exit 1
}

if ! "$python" -c 'import triton'; then
    case "$(uname -sm)" in
    "Linux x86_64" | "Linux aarch64")
        echo "ci/kernels.sh: Triton is missing here; run: make clean test" >&2 && exit 1
        ;;
    *) echo "ci/kernels.sh: no Triton for $(uname -sm): the kernels were NOT tested" && exit 0 ;;
    esac
fi

[ "$which" = compiled ] || TRITON_INTERPRET=1 run_tests -m "not slow" tests/test_kernels*.py "$@"
[ "$which" = interpreted ] || run_tests -m "kernels and not slow" "$@"
