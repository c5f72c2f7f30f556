#!/usr/bin/env bash
# A Slurm cluster of its own on one machine: a controller and N nodes with pretended GPUs, as root, nothing under /etc
# touched and no service used.
#
#     scripts/slurm_cluster.sh start FOLDER [N]    then: export SLURM_CONF=FOLDER/etc/slurm.conf
#     scripts/slurm_cluster.sh stop FOLDER
#     scripts/slurm_cluster.sh node FOLDER NAME    start one slurmd (again), such as n2
#
# Variables: BASE_PORT (of N + 12 ports), GPUS and CPUS that a node pretends to have, EXTRA_CONF (lines for slurm.conf).
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
action=${1:?start, stop or node} root=$(realpath -m "${2:?a folder}")
export SLURM_CONF=$root/etc/slurm.conf

write_configuration() {
    local nodes=$1 base=${BASE_PORT:-17000} gpus=${GPUS:-8} cpus=${CPUS:-64} host names ports gpu
    host=$(hostname -s)
    mkdir -p "$root"/{etc,state,spool,log,run,dev}
    chmod 755 "$root" "$root"/{etc,state,spool,log,run}
    [ -s "$root/etc/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$root/etc/munge.key")
    for gpu in $(seq 0 $((gpus - 1))); do
        [ -e "$root/dev/nvidia$gpu" ] || mknod "$root/dev/nvidia$gpu" c 1 3
    done
    names="n[1-$nodes]" ports="$((base + 11))-$((base + 10 + nodes))"
    if [ "$nodes" -eq 1 ]; then names=n1 ports=$((base + 11)); fi
    # cred_expire bounds how long a requeued job waits to be eligible again (121 s by default).
    cat >"$SLURM_CONF" <<CONF
ClusterName=hope$base
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$((base + 1))
SlurmdPort=$((base + 10))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$root/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd.%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
UnkillableStepTimeout=20
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,sched_min_interval=100000,batch_sched_delay=0,nohold_on_prolog_fail
JobRequeue=1
DefMemPerCPU=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
NodeName=$names NodeHostname=$host NodeAddr=127.0.0.1 Port=$ports CPUs=$cpus RealMemory=200000 Gres=gpu:$gpus State=UNKNOWN
PartitionName=train Nodes=ALL Default=YES MaxTime=7-0 State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=${GRACE_TIME:-10}
PartitionName=urgent Nodes=ALL MaxTime=7-0 State=UP PriorityTier=100 PreemptMode=OFF
PartitionName=short Nodes=n1 MaxTime=10 State=UP PriorityTier=10 PreemptMode=OFF
${EXTRA_CONF:-}
CONF
    printf 'NodeName=%s Name=gpu File=%s/dev/nvidia[0-%d]\n' "$names" "$root" $((gpus - 1)) >"$root/etc/gres.conf"
}

start() {
    local nodes=${1:-4} node
    write_configuration "$nodes"
    munged --force --key-file="$root/etc/munge.key" --socket="$root/run/munge.socket" \
        --pid-file="$root/run/munged.pid" --log-file="$root/log/munged.log" --seed-file="$root/run/munge.seed"
    slurmctld -f "$SLURM_CONF"
    for node in $(seq 1 "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$node"; done
    for _ in $(seq 200); do
        if [ "$(sinfo -h -N -p train -o '%T' 2>/dev/null | grep -c '^idle$')" -ge "$nodes" ]; then return; fi
        sleep 0.1
    done
    printf 'error: the cluster did not come up; its logs are in %s\n' "$root/log" >&2
    tail -n 5 "$root"/log/*.log >&2
    exit 1
}

stop() {
    local file process pids=()
    timeout 5 scancel --quiet -u "$(id -un)" 2>/dev/null || true
    sleep 1
    for file in "$root"/run/slurmd.*.pid "$root"/run/slurmctld.pid; do
        [ -s "$file" ] && pids+=("$(cat "$file")")
    done
    # Daemons of job steps, told from those of any other cluster by the files they hold.
    for process in /proc/[0-9]*; do
        if [ "$(cat "$process/comm" 2>/dev/null)" = slurmstepd ] && ls -l "$process/fd" 2>/dev/null | grep -qF "$root/"; then
            pids+=("${process#/proc/}")
        fi
    done
    kill -TERM "${pids[@]}" 2>/dev/null || true
    for _ in $(seq 30); do
        kill -0 "${pids[@]}" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "${pids[@]}" 2>/dev/null || true
    [ -s "$root/run/munged.pid" ] && kill "$(cat "$root/run/munged.pid")" 2>/dev/null || true
    rm -f "$root"/run/*.pid
}

case $action in
    start) start "${3:-4}" ;;
    stop) stop ;;
    node) slurmd -f "$SLURM_CONF" -N "${3:?a name}" ;;
    *)
        printf 'error: %s is not start, stop or node\n' "$action" >&2
        exit 2
        ;;
esac
