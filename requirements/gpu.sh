#!/usr/bin/env bash
# Adds requirements/gpu.txt to a Python that has a CUDA build of torch, and nvcc beside it: an image's (Dockerfile) or a node's own. torch itself
# is left as it is.
# usage: [PYTHON=python3] requirements/gpu.sh, then python3 -m pip install --no-deps --no-build-isolation .
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
list=$root/requirements/gpu.txt python=${PYTHON:-python3}

fail() { echo "gpu.sh: $*" >&2; exit 2; }
pip() { "$python" -m pip install --disable-pip-version-check --no-cache-dir --no-deps "$@"; }

torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$root/requirements/gpu.in")
found=$("$python" -c 'import sys, torch; print("%d.%d" % sys.version_info[:2], torch.__version__.split("+")[0], torch.version.cuda)') \
  || fail "$python has no torch: take an image, or an environment, with a CUDA build of torch $torch"
case $found in
  "3.12 $torch 13."*) ;;
  *) read -r version other cuda <<<"$found"
     fail "Python $version, torch $other, CUDA $cuda here; vLLM's wheel wants Python 3.12, torch $torch, CUDA 13: take a base with these (BASE=)" ;;
esac
command -v nvcc > /dev/null || fail "no nvcc: take a base with the CUDA toolkit (a -devel image), which Transformer Engine is compiled with"

compiled='^transformer-engine-torch=='
wheels=$(mktemp)
trap 'rm -f "$wheels"' EXIT
grep -v "$compiled" "$list" > "$wheels"
pip --requirement "$wheels"
# The one package that is compiled: against the base's torch (hence no build isolation), and never a wheel from elsewhere.
NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 pip --no-build-isolation "$(grep "$compiled" "$list")"
"$python" -c "import torch; assert torch.__version__.startswith('$torch') and torch.version.cuda, torch.__version__"
