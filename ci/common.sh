# Sourced by the other scripts.

make_venv() { # make_venv FOLDER PYTHON: a virtual environment; anew if an earlier try broke off
    "$1/bin/python" -m pip --version &>/dev/null || "$2" -m venv --clear "$1"
}

# make_venv_upon_ours FOLDER: anew, seeing what .venv holds, pip included; what is installed into it
# goes first
make_venv_upon_ours() {
    local site
    .venv/bin/python -m venv --clear --without-pip "$1"
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$site')" >"$(echo "$1"/lib/python*/site-packages)/ours.pth"
}

alone() { # alone COMMAND...: not while another `alone` of this checkout runs, where flock is there
    if command -v flock >/dev/null; then
        (flock 9 && "$@") 9<pyproject.toml
    else
        "$@"
    fi
}

install() { # install FOLDER WHAT ARGUMENTS...: with pip, saying what
    local venv=$1 quiet=()
    echo "[$venv] $2" && shift 2
    [ -t 1 ] || quiet=(-qq) # a terminal gets progress bars, a log file only the line above
    "$venv/bin/python" -m pip install --disable-pip-version-check \
        ${quiet[@]+"${quiet[@]}"} "$@"
}

cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }

# run_tests ARGUMENTS...: pytest with $PYTHON, in WORKERS processes (as many as there are cores).
# Each starts with a contiguous part of the tests, so that those of a file share fixtures and
# caches, and takes some of another's when it has finished.
run_tests() {
    local python=${PYTHON:-.venv/bin/python}
    "$python" -c 'import xdist' || {
        echo "$0: pytest-xdist is missing; run: make lint" \
            "(or: $python -m pip install -c constraints.txt pytest-xdist)" >&2
        return 1
    }
    # Tests set one thread; libraries that start theirs when they are imported need to be told.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m pytest -q -p no:cacheprovider \
        -n "${WORKERS:-$(cores)}" --dist worksteal "$@"
}
