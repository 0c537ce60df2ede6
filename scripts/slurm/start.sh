#!/usr/bin/env bash
# A SLURM cluster of one node, this machine, without systemd. As root, since slurmd starts jobs as their users.
#
#   scripts/slurm/start.sh DIR        then: export SLURM_CONF=DIR/slurm.conf
#   scripts/slurm/stop.sh DIR
set -euo pipefail
folder=${1:?usage: $0 DIR}
if [ "$(id -u)" -ne 0 ]; then
  echo "$0: needs root: slurmd starts jobs as their users" >&2
  exit 2
fi
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null || { echo "$0: no $program here; scripts/slurm/install.sh installs it" >&2; exit 2; }
done
if (: < /dev/tcp/127.0.0.1/6817) 2>/dev/null; then
  echo "$0: something listens at port 6817 already, such as another slurmctld" >&2
  exit 2
fi
mkdir -p "$folder"/{state,spool,log}
folder=$(cd "$folder" && pwd)
export SLURM_CONF=$folder/slurm.conf
host=$(hostname -s)

# munge says who sends a message. It wants a key of its own, and to run as its own user.
if [ ! -s /etc/munge/munge.key ]; then
  dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=128 status=none
  chown munge: /etc/munge/munge.key
  chmod 400 /etc/munge/munge.key
fi
install -d -o munge -g munge -m 0755 /run/munge
install -d -o munge -g munge -m 0700 /var/log/munge /var/lib/munge
if ! munge -n >/dev/null 2>&1; then
  runuser -u munge -- munged
  touch "$folder/munged.ours"  # so that stop.sh ends it
fi
for _ in $(seq 50); do
  munge -n 2>/dev/null | unmunge >/dev/null 2>&1 && break
  sleep 0.1
done

# cred_expire: a requeued job waits for the end of its old credential, two minutes by default.
# linuxproc, task/none: no cgroups are needed, so that it works in a container.
# config_overrides: four cores whatever there are, so that arrays and several ranks can be tried on two.
# slurmctld listens on the loopback only, as NodeAddr and the controller's address say.
cat > "$SLURM_CONF" <<C
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdParameters=config_overrides
SlurmdPidFile=$folder/slurmd.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ReturnToService=2
MinJobAge=3600
KillWait=5
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
JobRequeue=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=1024 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
C
slurmctld
slurmd
for _ in $(seq 100); do
  sinfo -h -o %T 2>/dev/null | grep -q idle && exit 0
  sleep 0.1
done
echo "$0: the node did not come up; see $folder/log" >&2
exit 1
