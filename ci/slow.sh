#!/usr/bin/env bash
# Runs the tests that `make test` leaves out: more executed kernels, faults planted in the kernels,
# and benchmarks from end to end. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh

run_tests --durations=5 -m slow "$@"
