#!/bin/sh
# A Slurm of one node on this machine, to run sweeps on: Debian's packages, this machine's cores, memory and GPUs, and
# accounting, without which submitit cannot learn that a job was killed. Needs root or sudo; no systemd, no cgroups.
#   tools/slurm_node.sh start [--without-accounting]   returns when the node is idle
#   tools/slurm_node.sh stop                           cancels all jobs, ends every daemon, leaves no file behind
# Everything lies in one folder, $SLURM_NODE_DIR; outside it there is only the link /etc/slurm/slurm.conf, so that sbatch
# and its kind find the node. A machine that has a Slurm of its own is left alone.
set -eu
umask 022

dir=${SLURM_NODE_DIR:-/var/lib/awq-pycuda-slurm}
conf=$dir/slurm.conf
link=/etc/slurm/slurm.conf
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps daemons

say() { echo "slurm_node: $*"; }
die() {
    say "$*" >&2
    exit 1
}

# By their environment ours are told from others: daemons are started with the mark, and Slurm gives jobs SLURM_CONF.
mark=AWQ_SLURM_NODE=$dir
processes_with() { grep -lszxF "$1" /proc/[0-9]*/environ | cut -d / -f 3 || true; }
our_daemons() { processes_with "$mark"; }
slurm_daemons() { grep -lsxE 'slurm(ctld|d|dbd)' /proc/[0-9]*/comm | cut -d / -f 3; }
our_jobs() {
    for pid in $(processes_with "SLURM_CONF=$conf"); do
        if grep -qsz '^SLURM_JOB_ID=' "/proc/$pid/environ"; then echo "$pid"; fi
    done
}

# within SECONDS COMMAND...: whether the command succeeds in that time.
within() {
    deadline=$(($(date +%s) + $1))
    shift
    until "$@"; do
        [ "$(date +%s)" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

# install_packages PACKAGE:COMMAND...: those whose command is missing.
install_packages() {
    missing=
    for pair in "$@"; do command -v "${pair#*:}" >/dev/null || missing="$missing ${pair%%:*}"; done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || die "missing here:$missing; only Debian's apt-get is known to this script"
    say "installing$missing"
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of package names
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null
}

refuse_other_slurm() {
    if [ -e "$link" ] || [ -L "$link" ]; then
        [ "$(readlink "$link")" = "$conf" ] || die "$link is not this script's: this machine has a Slurm of its own"
    fi
    ours=$(our_daemons)
    for pid in $(slurm_daemons); do
        [ -e "/proc/$pid/exe" ] || continue # a zombie
        echo "$ours" | grep -qx "$pid" || die "process $pid: this machine has a Slurm of its own running"
    done
    if [ -e "$dir" ] && [ ! -e "$dir/.slurm_node" ]; then die "$dir is there already and not this script's"; fi
}

write_config() {
    host=$(hostname -s)
    find /dev -maxdepth 1 -name 'nvidia[0-9]*' | sort -V | sed 's/^/Name=gpu File=/' >"$dir/gres.conf"
    gpus=$(wc -l <"$dir/gres.conf")
    # A user's OMP_NUM_THREADS does not make the machine smaller, but nproc heeds it.
    cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
    memory=$(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo)
    cat >"$conf" <<EOF
ClusterName=awq
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/spool
SlurmdPidFile=$dir/slurmd.pid
SlurmdLogFile=$dir/slurmd.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Cores and memory are what a job asks for, not a node: jobs run side by side. One that asks for neither gets a core
# and its share of the memory.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=$((memory / cores))
# Without cgroups memory is only sampled; a job beyond its limit is killed at the next sample.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
# From SIGTERM to SIGKILL for a job that is cancelled or out of time.
KillWait=2
ReturnToService=2
$([ "$gpus" -eq 0 ] || echo "GresTypes=gpu")
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory$([ "$gpus" -eq 0 ] || echo " Gres=gpu:$gpus")
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE
EOF
}

# A database of its own: root alone may log in, through a socket in the folder.
start_accounting() {
    cat >>"$conf" <<EOF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePass=$dir/munge.socket
EOF
    cat >"$dir/slurmdbd.conf" <<EOF
DbdHost=localhost
DbdAddr=127.0.0.1
CommunicationParameters=NoInAddrAny
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
LogFile=$dir/slurmdbd.log
PidFile=$dir/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
EOF
    chmod 600 "$dir/slurmdbd.conf"
    # No care for the disk: nothing here is kept. The lock's timeout is what slurmdbd asks for.
    set -- --no-defaults --user=root --datadir="$dir/database" --innodb-log-file-size=4M --skip-innodb-doublewrite \
        --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900
    env "$mark" mariadb-install-db "$@" --skip-test-db --auth-root-authentication-method=socket >"$dir/mariadb.log" 2>&1
    env "$mark" setsid mariadbd "$@" --socket="$dir/database.socket" --pid-file="$dir/mariadb.pid" --skip-networking \
        </dev/null >>"$dir/mariadb.log" 2>&1 &
    within 20 test -S "$dir/database.socket"
    env "$mark" MYSQL_UNIX_PORT="$dir/database.socket" SLURM_CONF="$conf" slurmdbd
    within 20 answers sacctmgr -n show cluster
}

# Without its configuration a Slurm command tries again for a minute.
answers() { [ -e "$conf" ] && SLURM_CONF=$conf timeout 5 "$@" >/dev/null 2>&1; }
node_is() { [ -e "$conf" ] && SLURM_CONF=$conf timeout 5 sinfo -h -o %t 2>/dev/null | grep -qxE "$1"; }
no_jobs() { [ -z "$(SLURM_CONF=$conf timeout 5 squeue -h -o %A 2>/dev/null)" ]; }
no_daemons() { [ -z "$(our_daemons)" ]; }

start_daemons() {
    mkdir "$dir/state" "$dir/spool"
    dd if=/dev/urandom of="$dir/munge.key" bs=128 count=1 status=none
    chmod 400 "$dir/munge.key"
    # --force: munged would not run as root, nor with a socket in a folder that is not its own.
    env "$mark" munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" 2>>"$dir/munged.log"
    within 10 test -S "$dir/munge.socket"
    [ "$accounting" = no ] || start_accounting
    ln -sfn "$conf" "$link"
    env "$mark" slurmctld -f "$conf"
    within 20 answers sinfo # a slurmd that comes earlier would wait long before its next try
    env "$mark" slurmd -f "$conf"
    within 30 node_is idle
}

start() {
    accounting=yes
    [ "${1-}" != --without-accounting ] || accounting=no
    refuse_other_slurm
    install_packages munge:munged slurm-wlm:slurmctld
    [ "$accounting" = no ] || install_packages slurmdbd:slurmdbd mariadb-server-core:mariadbd \
        mariadb-client-core:my_print_defaults
    if node_is 'idle|mix|alloc'; then
        say "is running already"
        return
    fi
    clear_away # what a start that was killed has left
    mkdir -p "$dir" "$(dirname "$link")"
    touch "$dir/.slurm_node"
    write_config
    trap give_up EXIT
    trap 'exit 1' INT TERM HUP
    start_daemons
    trap - EXIT INT TERM HUP
    say "$host is idle: $cores cores, $memory MB, $gpus GPUs"
}

give_up() {
    say "the node did not become idle; the ends of its logs:" >&2
    tail -n 10 "$dir"/*.log >&2
    clear_away
    exit 1
}

clear_away() {
    if answers scontrol ping; then
        SLURM_CONF=$conf squeue -h -o %A | sort -u | xargs -r env SLURM_CONF="$conf" scancel
        within 15 no_jobs || say "jobs outlived scancel; they are killed" >&2
    fi
    our_daemons | xargs -r kill 2>/dev/null || true
    within 15 no_daemons || our_daemons | xargs -r kill -9 2>/dev/null || true
    within 5 no_daemons || die "these do not end: $(our_daemons)"
    our_jobs | xargs -r kill -9 2>/dev/null || true
    [ "$(readlink "$link" 2>/dev/null)" != "$conf" ] || rm "$link"
    if [ -e "$dir/.slurm_node" ]; then rm -rf "$dir"; fi
}

case "${1-} ${2-}" in
'start ' | 'start --without-accounting' | 'stop ') ;;
*)
    say "usage: tools/slurm_node.sh start [--without-accounting] | stop" >&2
    exit 2
    ;;
esac
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "must be run as root (there is no sudo here)"
    exec sudo SLURM_NODE_DIR="$dir" "$0" "$@"
fi
case $1 in
start) start "${2-}" ;;
stop) clear_away ;;
esac
