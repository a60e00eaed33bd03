#!/usr/bin/env bash
# Makes a virtual environment of a machine without a GPU: a locked list (requirements/cpu.txt; others need no torch) and this package, editable.
# usage: PYTHON=python3.11 requirements/install.sh VENV [LIST]
set -euo pipefail
venv=$1
root=$(cd "$(dirname "$0")/.." && pwd)
list=${2:-$root/requirements/cpu.txt}

fail() { echo "setup: $*" >&2; exit 2; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
  || fail "$PYTHON is not Python 3.11, for which $list is locked: install python3.11 or set PYTHON="
"$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$PYTHON" -m venv --clear "$venv" \
  || fail "$PYTHON cannot make a virtual environment: install python3.11-venv"
pip() { "$venv/bin/python" -m pip "$@" --disable-pip-version-check --quiet; }

# torch first and by its CPU name. Where pip's own index has only CUDA builds, uv knows where PyTorch keeps the CPU ones.
torch=$(grep '^torch==' "$list") || true
if [ -n "$torch" ] && ! "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch') != '${torch#torch==}')" 2>/dev/null; then
  pip install --no-deps "$torch" || { pip install uv && "$venv/bin/uv" pip install --python "$venv/bin/python" --no-deps --torch-backend cpu "$torch"; } \
    || fail "no CPU build of torch found ($torch): add PyTorch's CPU wheel index to pip's configuration (pytorch.org, Get Started, CPU)"
fi
pip install --no-deps --requirement "$list"
pip install --no-deps --no-build-isolation --editable "$root"
