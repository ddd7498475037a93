#!/usr/bin/env bash
# Install vitscale into .venv, with the versions that it is tested with (constraints.txt). A second run
# does nothing until pyproject.toml or constraints.txt change.
#   bash tools/setup.sh [EXTRA]        EXTRA: s3, gcs or http for a store; vtab for VTAB-1k; plots, onnx; dev for the tests
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit ;; esac
cd "$(dirname "$0")/.."
extras=$(sed -n '/^\[project.optional-dependencies\]/,/^\[/s/^\([a-z0-9]*\) = .*/\1/p' pyproject.toml)
requested="${1:-}"
for name in ${requested//,/ }; do # pip would only warn
    if ! grep -qxF -- "$name" <<<"$extras"; then
        echo "error: there is no extra $name; use one of: ${extras//$'\n'/, }" >&2
        exit 2
    fi
done
extra="${1:+[$1]}"
stamp=".venv/installed${1:+-$1}"
if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then exit 0; fi

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "vitscale needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
# Debian without python3-venv leaves one without pip, and so does Ctrl-C.
.venv/bin/python -c 'import pip' 2>/dev/null || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

echo "Installing into .venv; the first time takes a few minutes ..."
torch=$(grep '^torch==' constraints.txt)
index=()
# Without an NVIDIA GPU the CUDA build would be gigabytes for nothing. Where pip would not choose a CPU
# build by itself, tell it where one is.
if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    pip install --quiet --upgrade "pip>=23.3"
    pip install --quiet --dry-run --no-deps --report - "$torch" 2>/dev/null | grep -q '+cpu' ||
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi
pip install --quiet "${index[@]}" "$torch"
# setuptools warns at each editable install of folders with the package's name; there is none but it.
PYTHONWARNINGS=ignore pip install --quiet --constraint constraints.txt --editable ".$extra"
# timm alone: the models that the tests use need no torchvision, and transformers brought the rest.
[ "${1:-}" != dev ] || pip install --quiet --constraint constraints.txt --no-deps timm
touch "$stamp"
