#!/usr/bin/env bash
# Make .venv with the versions known to work (constraints.txt), once; run again it does nothing until they change.
#   bash tools/setup.sh [EXTRA]        EXTRA: dev for the test tools
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:+[$1]}"
stamp=".venv/installed${1:+-$1}"
if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then exit 0; fi

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "vitscale needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

echo "Installing into .venv (a few minutes the first time) ..."
torch=$(grep '^torch==' constraints.txt)
index=()
# Without an NVIDIA GPU the CUDA build would be gigabytes for nothing; where pip would not pick a CPU build, say where it is.
if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    pip install --quiet --upgrade "pip>=23.3"
    pip install --quiet --dry-run --no-deps --report - "$torch" 2>/dev/null | grep -q '+cpu' ||
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi
pip install --quiet "${index[@]}" "$torch"
pip install --quiet --constraint constraints.txt --editable ".$extra"
# timm by itself: no model of its needs torchvision, and what else it needs has come with transformers.
[ "${1:-}" != dev ] || pip install --quiet --constraint constraints.txt --no-deps timm
touch "$stamp"
