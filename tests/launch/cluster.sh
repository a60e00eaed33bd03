#!/usr/bin/env bash
# A throw-away Slurm on this one machine: real daemons as root, without systemd or cgroups; nothing outside of DIR is written.
#   cluster.sh up DIR      then: export SLURM_CONF=DIR/slurm.conf
#   cluster.sh down DIR    ends its jobs and daemons, and removes DIR
# Partition cpu: node1 and node2, whose slurmd run in mount and UTS namespaces of their own, so that each has its hostname, resolves the
# other's, and has a disk of its own at DIR/local; each has 8 CPUs, and two GPUs that no program finds. Partition gpu: 16 nodes of 8 GPUs, for
# `sbatch --test-only`, of which nothing exists but a slurmd that says so.
set -euo pipefail
command=$1 D=$(readlink -m "$2") nodes=2 paper=16
export SLURM_CONF=$D/slurm.conf

free_ports() { # the first of $1 free ports in a row, below those of the jobs' ranks and those that the kernel hands out
  local first port
  while true; do
    first=$((10000 + RANDOM % 9900))
    for ((port = first; port < first + $1; port++)); do
      if (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
    done
    echo "$first" && return
  done
}

configure() {
  local first i
  first=$(free_ports $((nodes + paper + 1)))
  cat >"$SLURM_CONF" <<C
ClusterName=throwaway
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$first
AuthType=auth/munge
# a requeued job may start when the credential of its last start has expired
AuthInfo=socket=$D/munge.sock,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/slurmctld.log
SlurmdLogFile=$D/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# CPUs as said below, whatever the machine has
SlurmdParameters=config_overrides
# the ranks' port is made of it: two such clusters on a machine are to differ
FirstJobId=$((1 + RANDOM))
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
JobRequeue=1
KillWait=20
MinJobAge=3600
GresTypes=gpu
PartitionName=gpu Nodes=h100-[1-$paper] MaxTime=INFINITE
PartitionName=cpu Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE
C
  for i in {0..7}; do mknod "$D/nvidia$i" c 1 3; done # Slurm hands them out as GPUs; no program finds one
  printf 'NodeName=%s Name=gpu File=%s\n' "node[1-$nodes]" "$D/nvidia[0-1]" "h100-[1-$paper]" "$D/nvidia[0-7]" >"$D/gres.conf"
  for ((i = 1; i <= paper; i++)); do
    echo "NodeName=h100-$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((first + nodes + i)) CPUs=128 CoresPerSocket=64" \
      "Sockets=2 RealMemory=1900000 Gres=gpu:8" >>"$SLURM_CONF"
  done
  printf '127.0.0.1 localhost %s\n' "$(hostname)" >"$D/hosts"
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=node$i NodeAddr=127.0.1.$i Port=$((first + i)) CPUs=8 RealMemory=4000 Gres=gpu:2" >>"$SLURM_CONF"
    echo "127.0.1.$i node$i" >>"$D/hosts"
  done
}

up() {
  local i
  [ ${#D} -le 95 ] || { echo "$D is too long for munge's socket: set TMPDIR (pytest --basetemp) to a shorter one" >&2; exit 1; }
  [ ! -e "$D" ] || { echo "$D is there already" >&2; exit 1; }
  umask 022
  mkdir -p "$D/local" "$D/state"
  install -d -m 700 "$D/munge"
  (umask 077 && head -c 128 /dev/urandom >"$D/munge/key")
  configure
  munged --force --key-file="$D/munge/key" --socket="$D/munge.sock" --pid-file="$D/munged.pid" --log-file="$D/munge/log" \
    --seed-file="$D/munge/seed"
  slurmctld -c
  for ((i = 1; i <= nodes; i++)); do
    unshare --mount --uts --propagation private bash -ec "hostname node$i; mount --bind '$D/hosts' /etc/hosts
      mount -t tmpfs -o size=64m node$i '$D/local'; exec slurmd -c -N node$i"
  done
  for ((i = 1; i <= paper; i++)); do slurmd -c -N "h100-$i"; done
  for ((i = 0; i < 300; i++)); do
    if [ "$(sinfo -h -N -t idle -r -o %N 2>/dev/null | wc -l)" = $((nodes + paper)) ]; then return; fi
    sleep 0.2
  done
  tail -n 30 "$D"/*.log >&2
  exit 1
}

down() {
  local file pids=() i
  scancel --full --signal=KILL --user=root 2>/dev/null || true # batch scripts, too, which would forward a milder one and save
  scancel --user=root 2>/dev/null || true
  for ((i = 0; i < 200; i++)); do # the daemons are needed for a job to end
    if [ -n "$(squeue --noheader 2>/dev/null)" ]; then sleep 0.1; else break; fi
  done
  for file in "$D"/slurmd.*.pid "$D/slurmctld.pid" "$D/munged.pid"; do
    if [ -f "$file" ]; then pids+=("$(cat "$file")"); fi
  done
  kill "${pids[@]}" 2>/dev/null || true
  for ((i = 0; i < 100; i++)); do
    if kill -0 "${pids[@]}" 2>/dev/null; then sleep 0.1; else break; fi
  done
  for i in $(pgrep -x slurmstepd); do # one that was late, and would report to a slurmd that is gone for ever
    if grep -qzxF "SLURM_CONF=$SLURM_CONF" "/proc/$i/environ" 2>/dev/null; then pids+=("$i"); fi
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
  rm -rf "$D"
}

"$command"
