#!/bin/sh
# Makes .venv with everything the project needs: the locked requirements, then our own packages, editable.
# Does nothing when that was done before with the same requirements. Run from the repository's root.
set -eu

venv=.venv
stamp=$venv/.installed
ours="shared services/gateway services/allocator services/reaper services/csp-syncer tools/csp-simulator tools/devstack tools/k8s-check tools/brokerctl"

inputs() {
    for package in $ours; do echo "$package/pyproject.toml"; done
    echo requirements/dev.txt
    echo tools/devstack/setup.sh
}

# Whether the interpreter is new enough and can make a virtual environment. It is run to find out: a version
# manager's stand-in exists and still fails, and Debian takes ensurepip out of python3.
suits() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# The distribution's first: a version manager has often built its own without the optimisations that make the tests
# need a fifth less time.
find_python() {
    for candidate in /usr/bin/python3 python3.13 python3.12 python3.11 python3 python3.14; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

install_python() {
    if [ "$(id -u)" != 0 ] || [ ! -f /etc/debian_version ]; then return 1; fi
    echo "setup: installing python3 and python3-venv" >&2
    apt-get -q update >&2 && DEBIAN_FRONTEND=noninteractive apt-get -q install -y python3 python3-venv >&2
}

want=$(cksum $(inputs))
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && "$venv/bin/python" -c ''; then
    exit 0
fi

rm -f "$stamp"
# A virtual environment that was moved, or whose interpreter is gone, cannot be repaired.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || { install_python && python=$(find_python); } || {
        echo "setup: needs Python 3.11 or newer with venv (Debian, Ubuntu: apt-get install python3 python3-venv)" >&2
        exit 2
    }
    echo "setup: making $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

# By uv, which takes a fifth of the time; by pip where only pip knows an index. Compiled at once, like by pip: else
# many processes that begin together would each compile the same.
install() {
    UV_COMPILE_BYTECODE=1 "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@" && return
    echo "setup: uv could not; once more with pip" >&2
    $pip install --quiet "$@"
}

echo "setup: installing the locked requirements"
pip="$venv/bin/python -m pip --disable-pip-version-check"
awk '/^[^ #]/ { uv = /^uv==/ } uv' requirements/dev.txt >"$venv/uv.txt"
$pip install --quiet --require-hashes -r "$venv/uv.txt"
install --require-hashes -r requirements/dev.txt
editable=
for package in $ours; do editable="$editable -e ./$package"; done
install --no-deps --no-build-isolation $editable

# Last, and in one step: an interrupted set-up is taken up again.
echo "$want" >"$stamp.new"
mv "$stamp.new" "$stamp"
