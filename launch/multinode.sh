#!/usr/bin/env bash
# A run on the hosts of a hostfile, by deepspeed over pdsh; started again after losses, until it is done.
#   bash launch/multinode.sh HOSTFILE CONFIG.toml [section.key=value ...]      --help says more
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python="$root/.venv/bin/python"
if [ ! -x "$python" ]; then
    echo "error: $python is missing; run bash tools/setup.sh in $root first, on every host" >&2
    exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" "$root/launch/multinode.py" "$@"
