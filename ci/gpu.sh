#!/usr/bin/env bash
# On a machine with a GPU, without a network, with the torch, Triton and pytest it has: the test suite, the benchmarks, and a pass of
# compute-sanitizer over a small case.
#
#   ci/gpu.sh OUTDIR [tests|bench|sanitize|tune]
#
# tune is no part of the whole: the kernels with other values of the constants that cut their work (bench/tune.py).
#
# Leaves at most 8 files in OUTDIR: summary.txt, stderr.log, check.json, tests.xml, tests.log, bench.jsonl, bench.log, sanitize.log; of tune
# summary.txt, stderr.log, tune.jsonl, tune.log. It goes on after a failure and exits with 1 at the end if there was one. Every step has a
# time limit; together they stay under 9.5 minutes. Kernels are compiled on all cores: by bench/warm.py what single processes launch later,
# and by the tests where pytest-xdist is installed (one after the other they would not end in time).
# Elsewhere: python -m bench.records OUTDIR/bench.jsonl takes the rows over, python -m bench.report draws them.
set -uo pipefail
out=${1:?usage: ci/gpu.sh OUTDIR [tests|bench|sanitize|tune]}
what=${2:-all}
case "$what" in all | tests | bench | sanitize | tune) ;; *) echo "ci/gpu.sh: tests, bench, sanitize or tune, not $what" >&2 && exit 2 ;; esac
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=0
: >"$out/summary.txt" >"$out/stderr.log"

wanted() { [ "$what" = all ] || [ "$what" = "$1" ]; }

step() { # step NAME SECONDS LOG COMMAND...: standard output is appended to the log, errors to stderr.log, both go to the screen
    local name=$1 limit=$2 log=$3 start=$SECONDS rc
    shift 3
    echo "== $name (at most $limit s)"
    timeout -s INT -k 10 "$limit" "$@" 2> >(tee -a "$out/stderr.log" >&2) | tee -a "$log"
    rc=${PIPESTATUS[0]}
    [ "$rc" -eq 0 ] || failed=1
    echo "$name: exit $rc after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

# Limits of the whole, and of each part alone. At its limit a step is interrupted, so that pytest still says what failed until then. The
# benchmarks stop by themselves: no group is begun after the budget, and a long one then has 25 s to end.
warm_limit=70 tests_limit=145 flow_budget=25 graphs_budget=45 block_budget=60 sanitize_limit=50 tools=memcheck
[ "$what" = all ] || {
    warm_limit=90 tests_limit=380 flow_budget=60 graphs_budget=110 block_budget=170
    sanitize_limit=200 tools="memcheck racecheck"
}
case "$what" in all | bench) warmed=bench ;; *) warmed=tests ;; esac

bench() { # bench NAME BUDGET OPTIONS...
    local name=$1 budget=$2
    shift 2
    step "bench $name" $((budget + 25)) "$out/bench.log" ci/bench.sh --out "$out/bench.jsonl" --budget "$budget" "$@"
}

step info 30 "$out/summary.txt" "$PYTHON" -m fastflow_kernels info
# Triton compiles a launcher with the C compiler that it finds, against Python's headers: without them no kernel runs.
step warm "$warm_limit" "$out/summary.txt" "$PYTHON" -m bench.warm "$warmed"
step smallest 30 "$out/summary.txt" "$PYTHON" -m bench.smallest
if wanted tests; then
    rm -f "$out/check.json" "$out/tests.xml" "$out/tests.log"
    step check 40 "$out/check.json" "$PYTHON" -m fastflow_kernels check --json
    # What runs on a GPU; the rest is the same on any machine (make test). "plain" is about small inputs, which are no matter on a GPU.
    parallel=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$(nproc)" --maxschedchunk 4)
    # few processes of Inductor's own, beside those of pytest-xdist
    step tests "$tests_limit" "$out/tests.log" env TORCHINDUCTOR_COMPILE_THREADS=4 "$PYTHON" -m pytest -q --tb=short --durations=15 \
        --junitxml="$out/tests.xml" -p no:cacheprovider -m "not plain" ${parallel[@]+"${parallel[@]}"} \
        tests/test_gpu.py tests/test_kernels.py tests/test_cli.py tests/test_parity.py
fi
if wanted bench; then
    rm -f "$out/bench.jsonl" "$out/bench.log"
    # What the goals ask for comes first (bench/goals.py). Compiled and graphed providers take long to build: a few groups only.
    bench flow "$flow_budget" --kinds flow --workloads cflow/,fastflow-wrn50 --modes train --dtypes float32
    bench graphs "$graphs_budget" --kinds block --workloads cflow/1,tabular,fastflow-wrn50 --modes train --dtypes float32 \
        --providers freia-compiled,freia-graphs,ours-freia-graphs
    bench block "$block_budget" --kinds block
fi
if wanted sanitize; then
    rm -f "$out/sanitize.log"
    if command -v compute-sanitizer >/dev/null; then
        for tool in $tools; do
            # Every tensor its own allocation, or what lies beyond one is the next in torch's pool, and no error. Errors of the driver's own
            # calls are not counted: libraries ask for symbols that are not there.
            step "$tool" "$sanitize_limit" "$out/sanitize.log" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
                --report-api-errors no --error-exitcode 1 "$PYTHON" -m bench.smallest
        done
    else
        echo "sanitize: SKIPPED, compute-sanitizer is not installed" | tee "$out/sanitize.log" | tee -a "$out/summary.txt"
    fi
fi
if [ "$what" = tune ]; then
    rm -f "$out/tune.jsonl" "$out/tune.log"
    step tune 300 "$out/tune.log" "$PYTHON" -m bench.tune --out "$out/tune.jsonl"
fi
exit "$failed"
