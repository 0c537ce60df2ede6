#!/usr/bin/env bash
# SLURM's daemons and commands from Debian's packages, for start.sh. Without accounting: what happened to a job is asked
# of the controller, which remembers it for some minutes.
set -euo pipefail
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "$0: needs root and apt-get (Debian, Ubuntu); elsewhere install slurmctld, slurmd, slurm-client and munge" >&2
  exit 2
fi
if type slurmctld slurmd sbatch munged >/dev/null 2>&1; then
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# policy-rc.d: the packages would start their own services, without a configuration
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
