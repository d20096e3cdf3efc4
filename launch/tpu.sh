#!/usr/bin/env bash
# A job on a Cloud TPU slice (v4, v5e, v5p, v6e) that a queued resource asks for.
#
# https://docs.cloud.google.com/tpu/docs/queued-resources
# https://docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh
# https://docs.cloud.google.com/tpu/docs/runtimes
# shellcheck disable=SC2153  # the settings are read by name
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/tpu.sh [--dry-run] create
       launch/tpu.sh [--dry-run] setup
       launch/tpu.sh [--dry-run] run STAGE[,STAGE...] CONFIG --workdir gs://DIR [--section.field VALUE ...]
       launch/tpu.sh [--dry-run] logs [WORKER]
       launch/tpu.sh [--dry-run] delete
       launch/tpu.sh [--dry-run] retry STAGE[,STAGE...] CONFIG --workdir gs://DIR [...]

create  asks for the slice and waits until it is there
setup   copies this folder to all workers and installs it; again after every change
run     runs the stages, one after the other, on all workers, and waits; the same command
        goes on waiting where it was interrupted. Exits with 0 if all workers did, with 2
        if a setting is wrong, with 130 if the job was stopped and saved, with 75 if the
        slice is gone, and else as the first worker that failed
logs    follows the log of a worker [default: 0]
delete  deletes the slice, which costs money until then
retry   create, setup, run and delete, until run exits with 0 or 2; then deletes the slice
        too. The results are in the workdir, where the next attempt continues

--dry-run prints the commands and runs none of them.

settings, from the environment:
  PROJECT_ID        of Google Cloud
  ZONE              such as us-west4-a
  TPU_NAME          of the slice and of its queued resource, such as dtrak
  ACCELERATOR_TYPE  such as v5litepod-16, v4-32, v5p-32, v6e-16       (create, retry)
  TIER              how it is paid for: spot, on-demand or reserved   (create, retry)
  RUNTIME_VERSION   [default: the one of the type]                    (create, retry)
  POLL_SECONDS      between two looks at the slice or job [default: 60]
  ATTEMPTS          of retry [default: 20]
  BACKOFF_SECONDS   before the second attempt; doubles up to half an hour [default: 60]
  TFDS_DATA_DIR, JAX_COMPILATION_CACHE_DIR and DTRAK_TRACEBACK are passed to the workers

Before the first run: gcloud auth login, and ssh-add ~/.ssh/google_compute_engine.
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/settings.sh"
POLL_SECONDS=${POLL_SECONDS:-60}
ATTEMPTS=${ATTEMPTS:-20}
BACKOFF_SECONDS=${BACKOFF_SECONDS:-60}

# Polls without an answer after which a slice counts as gone.
UNREACHABLE=10
# How long the others may go on after one worker has failed. Within half a minute of its
# death JAX ends them.
GRACE_SECONDS=600
# EX_TEMPFAIL of sysexits.h.
GONE=75

need PROJECT_ID "the project of Google Cloud" my-project
need ZONE "the zone of the slice" us-west4-a
need TPU_NAME "the name of the slice" dtrak
place=("--zone=$ZONE" "--project=$PROJECT_ID" --quiet)

check_create() {
    need ACCELERATOR_TYPE "the type and size of the slice" v5litepod-16
    need TIER "how the slice is paid for" "spot (or on-demand, reserved)"
    case $TIER in
        spot | reserved) tier=("--$TIER") ;;
        on-demand) tier=() ;;
        *) fail "TIER is $TIER; it must be spot, on-demand or reserved." ;;
    esac
    if [[ -z ${RUNTIME_VERSION:-} ]]; then
        case $ACCELERATOR_TYPE in
            v4-*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
            v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
            v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
            v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
            tpu7x-*) fail "ACCELERATOR_TYPE is $ACCELERATOR_TYPE, which the Cloud TPU API" \
                "does not have; use launch/xpk.sh." ;;
            *) need RUNTIME_VERSION "the image for $ACCELERATOR_TYPE" v2-alpha-tpuv6e ;;
        esac
    fi
}

# The state of the queued resource, NONE, or UNKNOWN where gcloud cannot say. A dry run
# takes it to be $1.
state() {
    local answer
    local ask=(gcloud compute tpus queued-resources describe "$TPU_NAME"
        "--format=value(state.state)" "${place[@]}")
    if [[ -n $dry_run ]]; then
        call "${ask[@]}"
        echo "$1"
    elif answer=$("${ask[@]}" 2>&1); then
        tail -n 1 <<<"$answer"
    elif [[ $answer == *NOT_FOUND* ]]; then
        echo NONE
    else
        say "$answer"
        echo UNKNOWN
    fi
}

create() {
    local seen
    seen=$(state NONE)
    if [[ $seen == NONE ]]; then
        call gcloud compute tpus queued-resources create "$TPU_NAME" \
            --node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" \
            --runtime-version="$RUNTIME_VERSION" ${tier[@]+"${tier[@]}"} \
            "${place[@]}" || return
        seen=$(state ACTIVE)
    fi
    until [[ $seen == ACTIVE ]]; do
        case $seen in
            FAILED | SUSPENDING | SUSPENDED | DELETING | NONE)
                say "$TPU_NAME is $seen; launch/tpu.sh delete makes place for another one."
                return 1
                ;;
        esac
        say "$TPU_NAME is $seen"
        sleep "$POLL_SECONDS"
        seen=$(state ACTIVE)
    done
}

# on_workers WHICH COMMAND: fails if it fails on one of them, or one cannot be reached.
on_workers() {
    call gcloud compute tpus tpu-vm ssh "$TPU_NAME" --worker="$1" --command="$2" \
        "${place[@]}"
}

setup() {
    local archive=${TMPDIR:-/tmp}/dtrak_jax-$TPU_NAME.tar.gz
    call tar -czf "$archive" --exclude=.git --exclude='.venv*' --exclude=__pycache__ \
        --exclude=./runs -C "$root" . &&
        call gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:dtrak_jax.tar.gz" \
            --worker=all "${place[@]}" &&
        on_workers all "mkdir -p dtrak_jax && tar -xzf dtrak_jax.tar.gz -C dtrak_jax \
&& $(with_settings bash dtrak_jax/launch/worker.sh install)"
}

run() {
    on_workers all "$(with_settings bash dtrak_jax/launch/job.sh start \
        bash dtrak_jax/launch/worker.sh "$@")" || return "$GONE"
    wait_for_job
}

wait_for_job() {
    local lines unreachable=0 failed_at="" code
    while :; do
        if lines=$(on_workers all "bash dtrak_jax/launch/job.sh status"); then
            [[ -z $dry_run ]] || return 0
            unreachable=0
            code=$(exit_code "$lines")
            [[ $code -eq 0 ]] || failed_at=${failed_at:-$SECONDS}
            if [[ $lines != *"job: running"* ]] ||
                [[ -n $failed_at && $((SECONDS - failed_at)) -gt $GRACE_SECONDS ]]; then
                break
            fi
        else
            case $(state ACTIVE) in
                ACTIVE) unreachable=$((unreachable + 1)) ;;
                UNKNOWN) ;;
                *) unreachable=$UNREACHABLE ;;
            esac
            if [[ $unreachable -ge $UNREACHABLE ]]; then
                say "$TPU_NAME is gone, or does not answer."
                return "$GONE"
            fi
        fi
        sleep "$POLL_SECONDS"
    done
    if [[ $code -ne 0 ]]; then
        on_workers all "tail -n 20 dtrak_jax_job/log" || true
        say "the job ended with $code, of: $(tr '\n' ' ' <<<"$lines")"
    fi
    return "$code"
}

# The exit code of a job from the status lines of its workers: a wrong setting before all,
# then one that was stopped, then the first other one.
exit_code() {
    local code worst=0
    while read -r code; do
        case $code,$worst in
            *,2) ;;
            2,* | 130,* | *,0) worst=$code ;;
        esac
    done < <(sed -n -e 's/^job: exit //p' -e "s/^job: [ln]o.*/$GONE/p" <<<"$1")
    echo "$worst"
}

delete() {
    call gcloud compute tpus queued-resources delete "$TPU_NAME" --force "${place[@]}"
}

retry() {
    local code pause=$BACKOFF_SECONDS attempt
    for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
        say "attempt $attempt of $ATTEMPTS"
        code=1
        if create && setup; then
            code=0
            run "$@" || code=$?
        fi
        delete || say "$TPU_NAME is still there, and may cost money."
        case $code in 0 | 2) return "$code" ;; esac
        if [[ $attempt -lt $ATTEMPTS ]]; then
            sleep "$pause"
            pause=$((pause * 2 < 1800 ? pause * 2 : 1800))
        fi
    done
    return "$code"
}

stopped() {
    say "stopped waiting. $TPU_NAME may still be there, and cost money, and its job go on." \
        "To delete it: $(quote env "TPU_NAME=$TPU_NAME" "ZONE=$ZONE" \
            "PROJECT_ID=$PROJECT_ID" launch/tpu.sh delete)"
    exit 130
}

case $subcommand in
    create) check_create ;;
    retry) check_create && check_job "$@" && check_bucket ;;
    run) check_job "$@" && check_bucket ;;
    setup | delete) ;;
    logs)
        on_workers "${1:-0}" "tail -n 50 -f dtrak_jax_job/log"
        exit
        ;;
    *) usage >&2 && exit 2 ;;
esac
trap stopped INT TERM
"$subcommand" "$@"
