#!/usr/bin/env bash
# Install everything and run every check: style, types, tests. Arguments go to pytest, and then the
# tests alone are run:
#   bash tools/test.sh tests/data
#   bash tools/test.sh --sweep         every exhaustive table whole
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit ;; esac
cd "$(dirname "$0")/.."
# Some tests need programs of the system: web servers, two hosts with ssh and pdsh, Slurm. They are
# installed where that takes no password; elsewhere these tests skip.
install_programs() {
    packages=()
    missing() { [ -x "$(PATH="$PATH:/usr/sbin:/sbin" command -v "$1")" ] || packages+=("${@:2}"); }
    missing nginx nginx-light
    missing sshd openssh-server openssh-client
    missing pdsh pdsh
    missing ip iproute2
    missing slurmctld slurm-wlm munge
    if [ ${#packages[@]} -eq 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
    get=(apt-get install -y -qq --no-install-recommends)
    export DEBIAN_FRONTEND=noninteractive
    # No service is started by the installation.
    policy=/usr/sbin/policy-rc.d own=
    [ -e "$policy" ] || { own=$policy && printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"; }
    trap '[ -z "$own" ] || rm -f "$own"' EXIT
    # One by one if not together: a system may have only some.
    "${get[@]}" "${packages[@]}" || { apt-get update -qq && "${get[@]}" "${packages[@]}"; } ||
        for package in "${packages[@]}"; do "${get[@]}" "$package" || true; done
}
install_programs >/dev/null 2>&1 & # meanwhile the download of torch
status=0
bash tools/setup.sh dev || status=$?
wait
[ $status = 0 ] || exit $status
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # else every process that a test starts compiles vitscale again
if [ $# -eq 0 ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/pyright vitscale
    set -- -n 2 --dist loadfile --no-loadscope-reorder  # most tests keep one core busy
fi
exec .venv/bin/python -m pytest "$@"
