#!/bin/sh
# Creates .venv with the locked requirements and the packages of this repository in editable mode. Does nothing if the
# requirements have not changed since the last run. Run it in the root of the repository.
set -eu

venv=.venv
stamp=$venv/.installed
ours="shared services/gateway services/allocator services/reaper services/csp-syncer services/provisioner services/console tools/csp-simulator tools/devstack tools/k8s-check tools/brokerctl"

inputs() {
    for package in $ours; do echo "$package/pyproject.toml"; done
    echo requirements/dev.txt
    echo requirements/npm.txt
    echo services/console/build_assets.py
    echo services/console/package-lock.json
    echo tools/devstack/setup.sh
}

# Succeeds for an interpreter that is new enough and can create a virtual environment. Executes it, because the shim of
# a version manager can exist and fail, and Debian ships python3 without ensurepip.
is_suitable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prefers the distribution's Python: version managers often build Python without optimisations, and the tests then take
# 25 % longer.
find_python() {
    for candidate in /usr/bin/python3 python3.13 python3.12 python3.11 python3 python3.14; do
        if is_suitable "$candidate"; then
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
# A virtual environment that was moved or has lost its interpreter must be created again.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || { install_python && python=$(find_python); } || {
        echo "setup: Python 3.11 or newer with venv is required (Debian, Ubuntu: apt-get install python3 python3-venv)" >&2
        exit 2
    }
    echo "setup: creating $venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi

# Uses uv, which is five times faster, and falls back to pip, because an index may be configured for pip only. Compiles
# the modules at once, because parallel test processes would otherwise each compile them.
install() {
    UV_COMPILE_BYTECODE=1 "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@" && return
    echo "setup: uv failed; retrying with pip" >&2
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

echo "setup: installing the locked browser packages of the console"
if ! command -v npm >/dev/null 2>&1; then
    echo "setup: npm is missing; using the npm of a Python package" >&2
    $pip install --quiet --require-hashes --target "$venv/npm" -r requirements/npm.txt
fi
"$venv/bin/python" services/console/build_assets.py "$venv/npm" || {
    echo "setup: the pages of the console cannot be built without its browser packages" >&2
    exit 2
}

# Written last and atomically, so that an interrupted set-up runs again.
echo "$want" >"$stamp.new"
mv "$stamp.new" "$stamp"
