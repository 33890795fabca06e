#!/bin/sh
# The GPU report from a checkout that is not installed, whatever its folder is called:
#   sh bench/gpu_report.sh [--stages a,b] [--commit HASH] [--dry --out FOLDER]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
ln -s "$root" "$home/pared"
PYTHONPATH="$home" PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 "${PYTHON:-python3}" -m pared.bench.gpu_report "$@"
