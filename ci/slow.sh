#!/usr/bin/env bash
# The tests that `make test` leaves out: more compiled kernels executed, faults planted in the
# kernels, benchmarks run from end to end. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh

run_tests --durations=5 -m slow "$@"
