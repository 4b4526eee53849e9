#!/usr/bin/env bash
# On a machine with a GPU, without a network, with the torch, Triton and pytest it has: the test suite and the benchmarks.
#
#   ci/gpu.sh OUTDIR [tests|bench]
#
# Leaves files under OUTDIR: info.txt, check.json, tests.xml, tests.log, bench.json, bench.log, stderr.log, summary.txt. It goes on after a
# failure and exits with 1 at the end if there was one. Every step has a time limit; together they stay under 9 minutes.
set -uo pipefail
out=${1:?usage: ci/gpu.sh OUTDIR [tests|bench]}
what=${2:-all}
case "$what" in all | tests | bench) ;; *) echo "ci/gpu.sh: tests or bench, not $what" >&2 && exit 2 ;; esac
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=0
: >"$out/summary.txt" >"$out/stderr.log"

step() { # step NAME SECONDS LOG COMMAND...: standard output goes to the log, errors to stderr.log, both to the screen
    local name=$1 limit=$2 log=$3 start=$SECONDS rc
    shift 3
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" 2> >(tee -a "$out/stderr.log" >&2) | tee "$log"
    rc=${PIPESTATUS[0]}
    [ "$rc" -eq 0 ] || failed=1
    echo "$name: exit $rc after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

tests_limit=290 bench_limit=170
[ "$what" = all ] || { tests_limit=450 bench_limit=450; }

step info 20 "$out/info.txt" "$python" -m fastflow_kernels info
if [ "$what" != bench ]; then
    step check 40 "$out/check.json" "$python" -m fastflow_kernels check --json
    # Left out: what needs the peers from PyPI, and what asks for a process with Triton's interpreter or for another target's compiler.
    step tests "$tests_limit" "$out/tests.log" "$python" -m pytest -q --durations=15 -m "not peers" --junitxml="$out/tests.xml" \
        -p no:cacheprovider --ignore=tests/test_kernels_interpreter.py --ignore=tests/test_kernels_compiled.py
fi
if [ "$what" != tests ]; then
    step bench "$bench_limit" "$out/bench.log" "$python" -m bench.block --out "$out/bench.json"
fi
exit "$failed"
