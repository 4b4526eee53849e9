#!/usr/bin/env bash
# Tests and measures the kernels on a machine with a GPU, with its own torch, Triton and pytest.
# It needs no network.
#
#   ci/gpu.sh OUTDIR                      every part; about 77 minutes at most
#   ci/gpu.sh OUTDIR first | second       where the GPU's time is limited; see below
#   ci/gpu.sh OUTDIR PART[:SECONDS] ...   these parts, each at most SECONDS or the limit below
#
#   info         30 s  versions and devices
#   warm        120 s  compile on all cores: kernels of the block benchmarks, blocks of `graphs`
#   smallest     60 s  every kernel once
#   tests       600 s  the tests that use a GPU
#   check       120 s  python -m fastflow_kernels check: accuracy and speed in one table
#   goals       400 s  block benchmarks that decide the goals (bench/goals.py)
#   graphs      300 s  one block compiled, and in CUDA graphs, ours with its kernels in the graph
#   flow        300 s  whole flows with their subnets
#   kernels     120 s  the time of each kernel by itself (bench/gpu/kernel_times.py)
#   memcheck    300 s  compute-sanitizer over `smallest`: accesses
#   racecheck   300 s  compute-sanitizer over `smallest`: races
#   tune        600 s  the kernels with other values of their constants (bench/gpu/tune.py)
#   block       900 s  block benchmarks of every other workload
#   couplings   120 s  FrEIA's coupling blocks: GLOW, RNVP, GIN, one-sided
#   reversible  300 s  reversible chains of several depths
#
# first takes at most 6.5 minutes. It runs 80 seconds of tests and measures the speed.
# second takes at most 5.5 minutes. It finds the best constants, and measures what they reach.
# It also runs compute-sanitizer.
#
# OUTDIR is a new folder. It gets summary.txt (read it first), stderr.log, check.txt, tests.log,
# bench.log, sanitize.log and rows.jsonl. Each row is written when it has been measured.
# `python -m bench record OUTDIR/rows.jsonl` takes the rows over. `make report` draws them.
# A part that fails or reaches its limit does not stop the others. The exit status is 1 then.
# Benchmarks begin nothing in the last 15 seconds of their limit, and print what they left out.
# PYTHON names the interpreter (default: python3).
set -uo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"; }

refuse() {
    echo "ci/gpu.sh: $1" >&2
    exit 2
}

declare -A limits=([info]=30 [warm]=120 [smallest]=60 [tests]=600 [check]=120 [goals]=400)
limits+=([graphs]=300 [flow]=300 [kernels]=120 [memcheck]=300 [racecheck]=300 [tune]=600)
limits+=([block]=900 [couplings]=120 [reversible]=300)

case "${1:-}" in
"" | -h | --help)
    usage
    exit $(($# ? 0 : 2))
    ;;
-*) refuse "expected a folder first, got $1" ;;
esac
out=$1
shift
case "${*:-all}" in
all)
    parts=(info warm smallest tests check goals graphs flow kernels memcheck racecheck tune block)
    parts+=(couplings reversible)
    ;;
first) parts=(info:10 warm:70 smallest:20 tests:80 goals:75 graphs:80 kernels:20 flow:35) ;;
second) parts=(smallest:20 tune:35 goals:85 couplings:30 tests:50 flow:35 memcheck:40 racecheck:35)
    ;;
*) parts=("$@") ;;
esac
for part in "${parts[@]}"; do
    [ -n "${limits[${part%%:*}]:-}" ] ||
        refuse "no part is called ${part%%:*}; parts: ${!limits[*]}"
    [[ $part =~ ^[a-z]+(:[0-9]+)?$ ]] || refuse "expected PART:SECONDS, got $part"
done
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    refuse "torch finds no GPU ($PYTHON); nothing was run"
[ ! -e "$out/summary.txt" ] || refuse "$out holds a run already; name a new folder"
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
failed=0
: >"$out/summary.txt" >"$out/stderr.log"

# step NAME SECONDS LOG COMMAND...: append standard output to the log and errors to stderr.log, and
# show both on the screen.
step() {
    local name=$1 limit=$2 log=$3 start=$SECONDS rc
    shift 3
    echo "== $name (at most $limit s; $start s of at most $total are gone)"
    # Interrupt at the limit: pytest then still prints what has failed.
    timeout -s INT -k 10 "$limit" "$@" 2> >(tee -a "$out/stderr.log" >&2) | tee -a "$log"
    rc=${PIPESTATUS[0]}
    [ "$rc" -eq 0 ] || failed=1
    echo "$name: exit $rc after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

bench() { # bench SECONDS OPTIONS...
    local limit=$1
    shift
    step "bench $part" "$limit" "$out/bench.log" "$PYTHON" -m bench compare --device cuda \
        --out "$out/rows.jsonl" --budget $((limit - 15)) "$@"
}

run() { # run PART SECONDS
    local part=$1 limit=$2 parallel=()
    local goals=fastflow-wrn50/1,fastflow-wrn50/2,fastflow-wrn50/3,cflow/1,tabular
    goals+=,fastflow-r18/1,fastflow-cait,fastflow-r18/2,fastflow-r18/3,cflow/
    local graphs=ours-compiled,ours-graphs,anomalib-graphs,freia-compiled,freia-graphs
    graphs+=,ours-freia-graphs
    case "$part" in
    info) step info "$limit" "$out/summary.txt" "$PYTHON" -m fastflow_kernels info ;;
    warm) step warm "$limit" "$out/summary.txt" "$PYTHON" -m bench.gpu.warm ;;
    smallest) step smallest "$limit" "$out/summary.txt" "$PYTHON" -m bench.gpu.smallest ;;
    tests)
        # `make test` runs the tests that need no GPU.
        "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "$(nproc)" --maxschedchunk 4)
        # Inductor starts few processes of its own, because pytest-xdist has started many.
        step tests "$limit" "$out/tests.log" env TORCHINDUCTOR_COMPILE_THREADS=4 \
            "$PYTHON" -m pytest -q --tb=short --durations=15 -p no:cacheprovider \
            ${parallel[@]+"${parallel[@]}"} \
            tests/test_gpu.py tests/test_kernels_{graphs,operators}.py tests/test_kernels*.py \
            tests/test_cli.py tests/test_parity.py tests/test_coupling_blocks.py
        ;;
    check) step check "$limit" "$out/check.txt" "$PYTHON" -m fastflow_kernels check ;;
    goals) bench "$limit" --workloads "$goals" --dtypes float32,bfloat16 ;;
    graphs)
        bench "$limit" --workloads cflow/1,tabular,fastflow-wrn50/1 --modes train \
            --providers "$graphs"
        ;;
    flow)
        bench "$limit" --kinds flow --workloads cflow/1,fastflow-wrn50 --modes train \
            --dtypes float32,bfloat16 \
            --providers ours,ours-freia,anomalib,freia,ours-graphs,ours-compiled
        ;;
    kernels)
        step kernels "$limit" "$out/bench.log" "$PYTHON" -m bench.gpu.kernel_times \
            --out "$out/rows.jsonl"
        ;;
    block) bench "$limit" --workloads all --dtypes float32,bfloat16 ;;
    couplings)
        bench "$limit" --workloads glow,cinn,cinn-images,rnvp,gin,one-sided \
            --dtypes float32,bfloat16
        ;;
    tune) step tune "$limit" "$out/bench.log" "$PYTHON" -m bench.gpu.tune --out "$out/rows.jsonl" ;;
    reversible)
        step reversible "$limit" "$out/bench.log" "$PYTHON" -m bench.reversible \
            --shape 32,256,64,64 --depths 1,4,8 --out "$out/rows.jsonl"
        ;;
    memcheck | racecheck)
        command -v compute-sanitizer >/dev/null || {
            echo "$part: SKIPPED, compute-sanitizer is not installed" |
                tee -a "$out/sanitize.log" "$out/summary.txt"
            return
        }
        # Give every tensor its own allocation: otherwise the next one in torch's pool lies behind
        # it, and an access there is no error. Ignore errors of API calls: libraries ask for symbols
        # that do not exist.
        step "$part" "$limit" "$out/sanitize.log" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$part" \
            --report-api-errors no --error-exitcode 1 "$PYTHON" -m bench.gpu.smallest
        ;;
    esac
}

seconds_of() { # seconds_of PART[:SECONDS]
    local seconds=${1#*:}
    [ "$seconds" != "$1" ] && echo "$seconds" || echo "${limits[$1]}"
}

total=0
for item in "${parts[@]}"; do total=$((total + $(seconds_of "$item"))); done
for item in "${parts[@]}"; do run "${item%%:*}" "$(seconds_of "$item")"; done
echo "== read $out/summary.txt"
exit "$failed"
