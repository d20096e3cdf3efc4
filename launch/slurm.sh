#!/usr/bin/env bash
# A job on GPU nodes of a Slurm cluster: submits launch/gpu.sbatch.
#
# https://slurm.schedmd.com/sbatch.html
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/slurm.sh [--dry-run] run STAGE[,STAGE...] CONFIG --workdir DIR [--section.field VALUE ...]

Submits the stages, one after the other, with one process for each node that uses all of
its GPUs. Two minutes before the time limit the job saves, and goes back into the queue,
as it does when it is preempted or a node fails; there it continues.

DIR, this folder and VENV must be on a file system that all nodes share, or DIR on
gs://. Where the nodes have no network, install on the login node first:
  JAX_PACKAGE='jax[cuda12]' launch/worker.sh install

--dry-run prints the command and does not run it.

settings, from the environment:
  NODES           how many
  GPUS_PER_NODE   how many of each, such as 8
  CPUS_PER_NODE   how many of each, such as 32
  TIME_LIMIT      of one turn, such as 24:00:00
  MAX_RESTARTS    how often the job may go back into the queue [default: 50]
  JAX_PACKAGE     what to install as JAX [default: jax[cuda12]]
  sbatch reads SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS and so on itself; the job
  inherits the environment, with TFDS_DATA_DIR and JAX_COMPILATION_CACHE_DIR
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/settings.sh"
[[ $subcommand == run ]] || { usage >&2 && exit 2; }

need NODES "how many nodes" 2
need GPUS_PER_NODE "the GPUs of each node" 8
need CPUS_PER_NODE "the CPUs of each node" 32
need TIME_LIMIT "the time limit of one turn" 24:00:00
check_job "$@"
call sbatch --nodes="$NODES" --gpus-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="$CPUS_PER_NODE" --time="$TIME_LIMIT" --chdir="$root" \
    "$root/launch/gpu.sbatch" "$@"
