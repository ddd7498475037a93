#!/usr/bin/env bash
# Install everything and run every check: style, types, tests. Arguments go to pytest, and then the
# tests alone are run:
#   bash tools/test.sh tests/data
#   bash tools/test.sh --sweep         every exhaustive table whole
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh dev
# The tests against web servers need nginx. It is installed where that takes no password; elsewhere
# these tests skip.
if ! command -v nginx >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get install -y -qq --no-install-recommends nginx-light ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends nginx-light; }; } >/dev/null 2>&1 || true
fi
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/pyright vitscale
    set -- -n 2 --dist loadfile --no-loadscope-reorder  # most tests keep one core busy
fi
exec .venv/bin/python -m pytest "$@"
