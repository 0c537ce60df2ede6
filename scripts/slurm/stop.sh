#!/usr/bin/env bash
# Ends the jobs and the daemons of the cluster that start.sh started in DIR, and nothing else.
set -euo pipefail
folder=$(cd "${1:?usage: $0 DIR}" && pwd)
export SLURM_CONF=$folder/slurm.conf

running() { [ -f "$folder/$1.pid" ] && kill -0 "$(cat "$folder/$1.pid")" 2>/dev/null; }

if running slurmctld; then
  scancel --me || true
  for _ in $(seq 150); do
    [ -z "$(squeue -h 2>/dev/null)" ] && break
    sleep 0.1
  done
fi
for daemon in slurmd slurmctld; do  # slurmd first: it tells the controller
  if running "$daemon"; then
    kill "$(cat "$folder/$daemon.pid")"
  fi
done
if [ -f "$folder/munged.ours" ]; then
  kill "$(cat /run/munge/munged.pid)" || true
  rm "$folder/munged.ours"
fi
for _ in $(seq 100); do
  running slurmctld || running slurmd || exit 0
  sleep 0.1
done
echo "$0: the daemons did not end; see $folder/log" >&2
exit 1
