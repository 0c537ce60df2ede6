#!/usr/bin/env bash
# Runs a command beside a SLURM cluster of one node, which ends with it.
#
#   scripts/slurm/with.sh denoiselab train -m study=NAME launcher=slurm trainer.accelerator=cpu
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap '"$here/stop.sh" "$folder" && rm -rf "$folder" || exit 1' EXIT
"$here/start.sh" "$folder"
SLURM_CONF=$folder/slurm.conf "$@"
