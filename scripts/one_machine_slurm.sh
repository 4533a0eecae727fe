#!/bin/bash
# A Slurm cluster of this machine alone, to try `tools/suite.py SUITE --launcher slurm`.
#
#   apt-get install slurmctld slurmd slurm-client munge     (Debian, Ubuntu)
#   scripts/one_machine_slurm.sh start [DIR]                needs root; DIR is /tmp/one_machine_slurm by default
#   export SLURM_CONF=/tmp/one_machine_slurm/slurm.conf     for sinfo, sbatch, ...
#   scripts/one_machine_slurm.sh stop [DIR]
#
# Configuration, logs, finished jobs (jobs.txt) and state are in DIR. It needs no systemd and no cgroups, so that it runs
# in a container, and it enforces no memory limits. `start` on a running cluster changes nothing.
set -euo pipefail
action=${1:-} dir=$(realpath -m "${2:-/tmp/one_machine_slurm}")
export SLURM_CONF=$dir/slurm.conf

running() { [ -s "$dir/$1.pid" ] && kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null; }

start() {
    for program in munged slurmctld slurmd sinfo; do
        command -v "$program" >/dev/null || { echo "error: no $program; see the first lines of $0" >&2; exit 1; }
    done
    [ "$(id -u)" = 0 ] || { echo 'error: start the cluster as root' >&2; exit 1; }
    mkdir -p "$dir"/{state,spool}
    if ! munge -n >/dev/null 2>&1; then
        install -d -o munge -g munge -m 0755 /run/munge
        install -d -o munge -g munge -m 0700 /var/log/munge /var/lib/munge
        setpriv --reuid=munge --regid=munge --clear-groups munged
        setpriv --reuid=munge --regid=munge --clear-groups cat /run/munge/munged.pid >"$dir/munged.pid"
    fi
    if running slurmctld && running slurmd; then echo 'runs already'; return; fi
    local host
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/jobs.txt
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    touch "$dir/jobs.txt"
    running slurmctld || slurmctld
    running slurmd || slurmd
    for _ in $(seq 30); do
        if sinfo -h -t idle,alloc,mix -o %D 2>/dev/null | grep -q .; then
            sinfo
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 1
    done
    echo "error: no node is up after 30 s; see $dir/slurmctld.log and $dir/slurmd.log" >&2
    exit 1
}

stop() {
    if running slurmctld; then # a daemon waits for its jobs, and they may save a checkpoint first
        scancel --user="$(id -un)" || true
        for _ in $(seq 60); do squeue -h | grep -q . || break; sleep 1; done
    fi
    for program in slurmd slurmctld munged; do
        if running "$program"; then
            kill "$(cat "$dir/$program.pid")"
            for _ in $(seq 75); do running "$program" || continue 2; sleep 0.2; done
            kill -KILL "$(cat "$dir/$program.pid")"
        fi
    done
}

case $action in
start | stop) "$action" ;;
*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
