#!/usr/bin/env bash
# Run a command if a SLURM cluster can be installed and started on this machine; if not, say why, which is no failure.
set -euo pipefail
here=$(dirname "$0")
if why=$("$here/install.sh" 2>&1 && "$here/with.sh" true 2>&1); then
  exec "$@"
fi
echo "left out, without SLURM: $*: ${why##*$'\n'}"
