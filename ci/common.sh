# Sourced by the other scripts.

make_venv() { # make_venv FOLDER PYTHON: make an environment, again if an earlier try broke off
    "$1/bin/python" -m pip --version &>/dev/null || "$2" -m venv --clear "$1"
}

# make_venv_upon_ours FOLDER: make an environment again that sees the packages of .venv and its pip.
# Its own packages come first.
make_venv_upon_ours() {
    local site
    .venv/bin/python -m venv --clear --without-pip "$1"
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$site')" >"$(echo "$1"/lib/python*/site-packages)/ours.pth"
}

alone() { # alone COMMAND...: wait for other `alone`s of this checkout, if there is flock
    if command -v flock >/dev/null; then
        (flock 9 && "$@") 9<pyproject.toml
    else
        "$@"
    fi
}

install() { # install FOLDER WHAT ARGUMENTS...: print WHAT, then install with pip
    local venv=$1 quiet=()
    echo "[$venv] $2" && shift 2
    [ -t 1 ] || quiet=(-qq) # a terminal gets progress bars, a log file only the line above
    "$venv/bin/python" -m pip install --disable-pip-version-check \
        ${quiet[@]+"${quiet[@]}"} "$@"
}

cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }

# run_tests ARGUMENTS...: run pytest with $PYTHON in WORKERS processes (default: one a core).
# Each starts with a contiguous part of the tests, so that those of a file share fixtures and
# caches. A process that has finished takes tests of another.
run_tests() {
    local python=${PYTHON:-.venv/bin/python}
    "$python" -c 'import xdist' || {
        echo "$0: pytest-xdist is missing; run: make lint" \
            "(or: $python -m pip install -c constraints.txt pytest-xdist)" >&2
        return 1
    }
    # Tests set one thread. Libraries that start threads when they are imported need the variable.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m pytest -q -p no:cacheprovider \
        -n "${WORKERS:-$(cores)}" --dist worksteal "$@"
}
