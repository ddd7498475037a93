#!/usr/bin/env bash
# Set everything up and run every check: style, types, tests. Arguments go to pytest: bash tools/test.sh tests/data
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh dev
# The tests of web servers need nginx: it is installed where that takes no password, and elsewhere they skip.
if ! command -v nginx >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get install -y -qq --no-install-recommends nginx-light ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends nginx-light; }; } >/dev/null 2>&1 || true
fi
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/pyright vitscale
fi
exec .venv/bin/python -m pytest "$@"
