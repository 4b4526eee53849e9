#!/usr/bin/env bash
# Tests with other versions of Python, torch, Triton and the peers. It runs what can depend on them:
# the block against the reference and the peers, checkpoints, accelerate, compile and export,
# chains, several processes, and the kernels without a GPU. Only `make test` runs the rest: all
# cases, dtypes and layouts, wrong inputs, benchmarks.
#
#   ci/versions.sh oldest       the oldest supported (ci/oldest.txt), Python 3.10
#   ci/versions.sh newest       the newest that pip finds for the newest Python here
#   ci/versions.sh triton-3.6   the kernels, with the Triton of torch 2.10 and 2.11 added to .venv
#
# The first two install some GB where torch comes as a CUDA build. The script looks for Pythons on
# the PATH and among pyenv's. Without a Python 3.10 `oldest` takes the default one, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh
which=${1:?usage: ci/versions.sh oldest|newest|triton-3.6}
started=$SECONDS
venv=.venv-$which

python_of() { # python_of VERSION: print the first interpreter of that version that runs
    local python is_it="import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$1')"
    for python in "python$1" "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1".*/bin/python; do
        "$python" -c "$is_it" 2>/dev/null && echo "$python" && return
    done
    return 1
}

make_venv_of_versions() { # make_venv_of_versions VERSIONS PINS...: with the first Python found
    local version versions=$1 base=
    shift
    for version in $versions; do base=$(python_of "$version") && break; done
    [ -n "$base" ] || {
        base=${PYTHON:-python3}
        echo "== no Python $versions here: with $("$base" -V)"
    }
    "$base" -m venv --clear "$venv" # again, because pip keeps what it finds
    # Do not compile to bytecode: most of torch is never imported.
    install "$venv" "torch" --no-compile "$@" "setuptools>=77.0.3" torch numpy
    alone install "$venv" "this package, with what the tests need" --no-compile "$@" \
        --no-build-isolation -e ".[test,triton]"
    install "$venv" "the peers" --no-compile --no-deps --no-build-isolation --use-pep517 \
        -r ci/peers.txt
}

block() { # block KEYWORDS: run the tests of the block
    # SciPy before 1.16 draws no rotation of one channel: the stock block cannot be built with one.
    echo "== the block"
    run_tests -m "not slow and not kernels" -k "not (C1- and -soft) $1" tests/test_autograd.py \
        tests/test_checkpoints.py tests/test_compile.py tests/test_distributed.py \
        tests/test_docs.py tests/test_layering.py tests/test_loading.py tests/test_patch*.py \
        tests/test_peers.py tests/test_probe.py tests/test_reference.py tests/test_reversible*.py \
        tests/test_torch_features.py tests/test_torch_private.py
}

interpreted() {
    local parity="coupling_parity and not (of_ or in_) or parity_of_gin"
    echo "== the kernels, interpreted"
    ci/kernels.sh interpreted -k "$parity or loops or soft or without"
}

compiled() {
    echo "== graphs that call the kernels"
    TRITON_INTERPRET=1 run_tests -m "not slow" tests/test_kernels_graphs.py
}

inspected() { # inspected KEYWORDS. Old versions need a linker of ROCm for gfx942.
    echo "== the kernels, compiled"
    run_tests -m "not slow" -k "not gfx942 and not fp16 and not fp64 $1" \
        tests/test_kernels_compiled.py
}

# executed FILES...: run one shape of planes and one of rows. `make test` runs all with the pinned
# Triton. Triton before 3.6 launches in another way than the executor expects.
executed() {
    echo "== the kernels, executed"
    run_tests -m "not slow" -k "not test_kernels or test_kernels_executed or B2-C7-4x5 or B5-C7" \
        tests/test_executor.py tests/test_launch_keys.py tests/test_kernels.py \
        tests/test_kernels_[bvt]*.py "$@"
}

[ -z "${CI:-}" ] || trap 'rm -rf "$venv"' EXIT # nobody uses it again, and it takes 6 GB
case "$which" in
oldest) make_venv_of_versions 3.10 -c ci/oldest.txt ;;
newest) make_venv_of_versions "3.14 3.13 3.12" ;;
triton-3.6)
    make_venv_upon_ours "$venv"
    install "$venv" "Triton 3.6" --no-deps triton==3.6.0
    ;;
*) echo "ci/versions.sh: oldest, newest or triton-3.6, not $which" >&2 && exit 2 ;;
esac
export PYTHON=$venv/bin/python
"$PYTHON" -m fastflow_kernels info
"$PYTHON" -m pip list --disable-pip-version-check 2>/dev/null |
    grep -iE '^(hypothesis|numpy|pytest|scipy|setuptools|triton) '

case "$which" in
oldest)
    block "and not cost_no_other_graph" # torch 2.7 makes a second graph
    interpreted
    compiled
    inspected "and not B10000-C100" # Triton 3.3 spills 8 bytes there, 3.6 and 3.9 none
    ;;
newest)
    block ""
    interpreted
    compiled
    inspected ""
    executed
    ;;
triton-3.6)
    interpreted
    inspected ""
    executed tests/test_kernels_executed.py
    ;;
esac
echo "== $which versions are fine ($((SECONDS - started)) s)"
