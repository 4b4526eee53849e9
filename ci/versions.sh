#!/usr/bin/env bash
# A part of the tests on the oldest supported versions (ci/oldest.txt, Python 3.10), or on the newest that pip finds for the newest Python
# here: the block against the reference and the peers, checkpoints, accelerate, compile and export, and the kernels without a GPU.
# `triton-3.6` is about the kernels alone, with the Triton that torch 2.10 and 2.11 bring and the torch that is pinned.
#
#   ci/versions.sh oldest|newest|triton-3.6      some GB the first time where torch comes as a CUDA build
#
# Pythons are looked for on the PATH and among pyenv's. Without a Python 3.10 the default one is taken for `oldest`, and said so.
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/common.sh
which=${1:?usage: ci/versions.sh oldest|newest|triton-3.6}
case "$which" in
oldest)
    versions=(3.10) pins=(-c ci/oldest.txt) extras=test,triton
    more=" and not cost_no_other_graph" # torch 2.7 makes a second one
    lean=" and not B10000-C100"         # ptxas of Triton 3.3 spills 8 bytes there; those of 3.6 and 3.9 nothing
    ;;
newest) versions=(3.14 3.13 3.12) pins=() extras=test,triton more= lean= ;;
triton-3.6) versions=(3.12 3.13 3.11) pins=(-c constraints.txt) extras=test more= lean= ;;
*) echo "ci/versions.sh: oldest, newest or triton-3.6, not $which" >&2 && exit 2 ;;
esac
started=$SECONDS

python_of() { # python_of VERSION: the first interpreter of that version that runs
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1".*/bin/python; do
        "$candidate" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null && echo "$candidate" && return
    done
    return 1
}

base=
for version in "${versions[@]}"; do base=$(python_of "$version") && break; done
[ -n "$base" ] || { base=${PYTHON:-python3} && echo "== no Python ${versions[*]} here: with $("$base" -V)"; }

venv=.venv-$which
[ -z "${CI:-}" ] || trap 'rm -rf "$venv"' EXIT # which nobody uses again, and which takes 6 GB
"$base" -m venv --clear "$venv"                # anew, for pip keeps what it finds
python=$venv/bin/python
install "$venv" "torch" ${pins[@]+"${pins[@]}"} "setuptools>=77.0.3" torch numpy
install "$venv" "this package, with what the tests need" ${pins[@]+"${pins[@]}"} --no-build-isolation -e ".[$extras]"
[ "$which" != triton-3.6 ] || install "$venv" "Triton 3.6" --no-deps triton==3.6.0 # whatever torch asks for
install "$venv" "the peers" --no-deps --no-build-isolation --use-pep517 -r ci/peers.txt
"$python" -m fastflow_kernels info
"$python" -m pip list --disable-pip-version-check 2>/dev/null | grep -iE '^(hypothesis|numpy|pytest|scipy|setuptools|triton) '

export OMP_NUM_THREADS=1
run() { "$python" -m pytest -q -p no:cacheprovider "$@"; }
if [ "$which" != triton-3.6 ]; then
    echo "== the block"
    # SciPy before 1.16 draws no rotation of one channel, so that the stock block cannot be built with one.
    run tests/test_reference.py tests/test_peers.py tests/test_checkpoints.py tests/test_loading.py tests/test_patch*.py tests/test_probe.py tests/test_autograd.py \
        tests/test_layering.py tests/test_docs.py tests/test_compile.py tests/test_torch_features.py tests/test_distributed.py \
        tests/test_reversible*.py -k "not (C1- and -soft)$more"
fi
echo "== the kernels, interpreted"
TRITON_INTERPRET=1 run tests/test_kernels{,_values,_blocks}.py -k 'coupling_parity and not (of_ or in_) or parity_of_gin or loops or soft or without'
echo "== the kernels, compiled"
run tests/test_kernels_compiled.py -k "not gfx942 and not fp16 and not fp64$lean" # gfx942: old versions ask for a linker of ROCm's
case "$which" in
triton-3.6) echo "== the kernels, executed" && run tests/test_executor.py tests/test_launch_keys.py tests/test_kernels{,_values,_traffic,_blocks,_executed}.py \
    -m "not slow" ;;
newest) echo "== the kernels, executed" && run tests/test_executor.py tests/test_launch_keys.py tests/test_kernels{,_values,_traffic,_blocks}.py -m "not slow" \
    -k "not test_kernels or B2-C7-4x5 or B5-C7" ;;
esac # Triton before 3.6 launches otherwise than tests/support/executor expects
echo "== $which versions are fine ($((SECONDS - started)) s)"
