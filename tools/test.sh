#!/usr/bin/env bash
# Set everything up and run every check: style, types, tests. Arguments go to pytest: bash tools/test.sh tests/data
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh dev
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/pyright vitscale
fi
exec .venv/bin/python -m pytest "$@"
