#!/usr/bin/env bash
# Installs Slurm and MUNGE on Debian or Ubuntu, for the tests that start a cluster of their own on this machine.
# Fast when they are there. Nothing is configured and no service is started: scripts/slurm_cluster.sh does that.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

programs=(slurmctld slurmd sbatch srun scontrol munged)
missing=()
for program in "${programs[@]}"; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || missing+=("$program")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

command -v apt-get >/dev/null || fail "${missing[*]}: not here, and there is no apt-get to install Slurm with; install slurm and munge by your system's own means"
become=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "installing Slurm needs root: run make setup-slurm as root"
    become=(sudo)
fi
log=$(mktemp)
printf 'setup-slurm: installing slurm-wlm and munge\n'
install() {
    "${become[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge >>"$log" 2>&1
}
# Package lists may be absent or old: they are fetched only then.
install || { "${become[@]}" apt-get update >>"$log" 2>&1 && install; } || {
    tail -n 15 "$log" >&2
    fail "apt-get could not install slurm-wlm and munge; its whole words are in $log"
}
rm -f "$log"
printf 'setup-slurm: %s\n' "$(sinfo --version 2>/dev/null || srun --version)"
