#!/usr/bin/env bash
# Runs a command of jaxllm on N pretend CPU devices, to try a mesh on a laptop:
#   launch/pretend_devices.sh 8 python -m jaxllm.train --config configs/quickstart.py --config.parallel.fsdp=4
set -euo pipefail
case "${1:-}" in "" | 0* | *[!0-9]*) set -- ;; esac # no number
if [ $# -lt 2 ]; then
  echo "usage: $0 N COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$1"
shift
exec "$@"
