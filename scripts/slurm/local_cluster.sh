#!/usr/bin/env bash
# A real SLURM on a single machine, for tests and drills: Debian or Ubuntu, as root, without systemd and cgroups.
#
#   eval "$(scripts/slurm/local_cluster.sh start)"   installs slurm-wlm and munge if missing, exports SLURM_CONF
#   scripts/slurm/local_cluster.sh stop              cancels all jobs and stops the daemons of `start`
#   scripts/slurm/local_cluster.sh clean             also deletes the cluster's directory
#
# CLUSTER_HOME   directory of configuration, keys, state and logs   ($TMPDIR/flexdraft-slurm)
# CLUSTER_NODES  number of nodes; several are emulated as n1, n2    (1)
# CLUSTER_CPUS   CPUs per node, possibly more than the machine has  (4)
# CLUSTER_PORT   first port on 127.0.0.1                            (16900)
#
# The emulated names do not resolve: jobs on n1 and n2 need MASTER_ADDR=127.0.0.1 and GLOO_SOCKET_IFNAME=lo. Without
# cgroups, memory and core limits are not enforced. Without accounting, sacct does not work.
set -euo pipefail

home=${CLUSTER_HOME:-${TMPDIR:-/tmp}/flexdraft-slurm} nodes=${CLUSTER_NODES:-1} cpus=${CLUSTER_CPUS:-4} port=${CLUSTER_PORT:-16900}
export SLURM_CONF=$home/slurm.conf

# Whether daemon $1 (munged, slurmctld, slurmd-<node>) runs. Process ids are reused: its name counts too.
runs() {
  local pid
  pid=$(cat "$home/$1.pid" 2>/dev/null) && [[ $(cat "/proc/${pid:-none}/comm" 2>/dev/null) == "${1%%-*}" ]]
}

stop() {
  if runs slurmctld; then
    scancel --user="$(id -un)" || true
    for _ in {1..100}; do
      if [[ -z $(squeue --noheader) ]]; then break; fi
      sleep 0.1
    done
  fi
  local file name
  for file in "$home"/slurmd-*.pid "$home/slurmctld.pid" "$home/munged.pid"; do
    name=$(basename "$file" .pid)
    runs "$name" || continue
    kill "$(cat "$file")"
    while runs "$name"; do sleep 0.1; done
    echo "stopped $name" >&2
  done
}

install_packages() {
  command -v slurmctld munged >/dev/null && return
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurm-wlm munge; } >&2
}

configure() {
  local host names=$1 ports=$((port + 1))
  host=$(hostname -s)
  if ((nodes > 1)); then ports="[$((port + 1))-$((port + nodes))]"; fi
  mkdir -p "$home"/{state,munge}
  chmod 755 "$home" "$home/munge"
  [[ -s $home/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >"$home/munge.key")
  echo "# none" >"$home/cgroup.conf"
  # cred_expire is how long a requeued job waits before it may start again, KillWait how long from SIGTERM to SIGKILL;
  # MinJobAge keeps finished jobs visible for scontrol. NoInAddrAny: listen on 127.0.0.1 only.
  cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket=$home/munge/socket,cred_expire=5
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool-%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd-%n.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5
JobCompType=jobcomp/filetxt
JobCompLoc=$home/jobs.log
ReturnToService=2
KillWait=5
MinJobAge=86400
SlurmdParameters=config_overrides
NodeName=$names NodeHostname=$host NodeAddr=127.0.0.1 Port=$ports CPUs=$cpus Sockets=1 CoresPerSocket=$cpus ThreadsPerCore=1
PartitionName=main Nodes=$names Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  local names node
  names=$(hostname -s)
  if ((nodes > 1)); then names="n[1-$nodes]"; fi
  install_packages
  configure "$names"
  runs munged || munged --key-file="$home/munge.key" --socket="$home/munge/socket" --pid-file="$home/munged.pid" \
    --log-file="$home/munged.log" --seed-file="$home/munge.seed" >&2
  runs slurmctld || slurmctld >&2
  for node in $(scontrol show hostnames "$names"); do
    mkdir -p "$home/spool-$node"
    runs "slurmd-$node" || slurmd -N "$node" >&2
  done
  for _ in {1..120}; do
    if (($(sinfo --noheader --Node --format=%T 2>/dev/null | grep -cE '^(idle|mixed|allocated)$') == nodes)); then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.25
  done
  echo "not all of $nodes node(s) came up, see $home/*.log" >&2
  exit 1
}

case ${1:-} in
start) start ;;
stop) stop ;;
clean) stop && rm -rf "$home" ;;
*) echo "usage: $0 start | stop | clean" >&2 && exit 2 ;;
esac
