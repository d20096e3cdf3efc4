#!/usr/bin/env bash
# A job on TPUs of a GKE cluster that xpk has made; also for TPU7x, which only GKE has.
#
# https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/workloads.md
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/xpk.sh [--dry-run] run STAGE[,STAGE...] CONFIG --workdir gs://DIR [--section.field VALUE ...]
       launch/xpk.sh [--dry-run] wait
       launch/xpk.sh [--dry-run] delete

run     submits the stages, one after the other, on all workers. Pods that are evicted, or
        whose job was stopped and saved (exit code 130), start again and continue; a wrong
        setting (exit code 2) ends the job
wait    waits until it has ended: 0 if it has succeeded, 125 if it has failed
delete  deletes the job; the nodes belong to the cluster

--dry-run prints the commands and runs none of them.

settings, from the environment:
  PROJECT_ID     of Google Cloud
  ZONE           of the cluster, such as us-west4-a
  CLUSTER        its name
  WORKLOAD       the name of the job, such as dtrak
  TPU_TYPE       such as v5litepod-16, v6e-16, tpu7x-16        (run)
  MAX_RESTARTS   [default: 50]                                 (run)
  GRACE_SECONDS  to save in before a pod is killed [default: 120]     (run)
  BASE_IMAGE     that this folder is added to [default: python:3.12]  (run)
  TFDS_DATA_DIR, JAX_COMPILATION_CACHE_DIR and DTRAK_TRACEBACK are passed to the workers
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/settings.sh"

need PROJECT_ID "the project of Google Cloud" my-project
need ZONE "the zone of the cluster" us-west4-a
need CLUSTER "the cluster, made by xpk cluster create" my-cluster
need WORKLOAD "the name of the job" dtrak
place=("--cluster=$CLUSTER" "--zone=$ZONE" "--project=$PROJECT_ID")

# xpk runs the command in a shell that passes SIGTERM on to it alone, hence exec; and
# starts pods again that exit with 42 or 127 to 255.
run() {
    call xpk workload create --workload="$WORKLOAD" "${place[@]}" --tpu-type="$TPU_TYPE" \
        --base-docker-image="${BASE_IMAGE:-python:3.12}" --script-dir="$root" \
        --max-restarts="${MAX_RESTARTS:-50}" \
        --termination-grace-period-seconds="${GRACE_SECONDS:-120}" \
        --command="exec $(with_settings bash launch/worker.sh "$@")"
}

case $subcommand in
    run)
        need TPU_TYPE "the type and size of the slice" v5litepod-16
        check_job "$@" && check_bucket
        run "$@"
        ;;
    wait) call xpk workload list "${place[@]}" --wait-for-job-completion="$WORKLOAD" ;;
    delete) call xpk workload delete --workload="$WORKLOAD" "${place[@]}" ;;
    *) usage >&2 && exit 2 ;;
esac
