# Sourced by the scripts that make environments.

make_venv() { # make_venv FOLDER PYTHON: a virtual environment; made anew where an earlier try was interrupted
    "$1/bin/python" -m pip --version &>/dev/null || "$2" -m venv --clear "$1"
}

install() { # install FOLDER WHAT ARGUMENTS...: with pip, saying what
    local venv=$1 quiet=()
    echo "[$venv] $2" && shift 2
    [ -t 1 ] || quiet=(-qq) # a terminal gets pip's progress bars, a log file only the line above
    "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} "$@"
}
