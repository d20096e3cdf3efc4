#!/usr/bin/env bash
# What every worker runs: on a TPU VM, in a container on GKE, on a node of Slurm.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/worker.sh [--dry-run] STAGE[,STAGE...] CONFIG --workdir DIR [--section.field VALUE ...]
       launch/worker.sh [--dry-run] install

Installs the project once, with a Python of its own, and runs the stages of dtrak-jax one
after the other; the first one that fails ends it, with that exit code. SIGTERM is passed
on, so that the stage can save. `install` only installs.

Many workers may start at once on one file system: one installs, and the others wait.

settings, from the environment:
  JAX_PACKAGE        what to install as JAX: jax[tpu], jax[cuda12], or jax for a CPU
  VENV               where [default: .venv-launch in the project]
  PYTHON_VERSION     [default: 3.12]
  DTRAK_DISTRIBUTED  1 joins the other workers, nothing is for one process alone [default: 1]
  JAX_COMPILATION_CACHE_DIR, TFDS_DATA_DIR and the like are passed on as they are
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/settings.sh"
need JAX_PACKAGE "what to install as JAX" "'jax[tpu]'"
VENV=${VENV:-$root/.venv-launch}
cd "$root"

# uv brings the Python that the images of TPU VMs, with 3.10, do not have.
# https://docs.astral.sh/uv/reference/installer
find_uv() {
    uv=$(command -v uv || echo "$VENV-uv/uv")
    [[ -x $uv ]] || call env UV_UNMANAGED_INSTALL="$VENV-uv" \
        bash -c "set -o pipefail; curl -LsSf https://astral.sh/uv/install.sh | sh"
}

# Editable, so that only a change of the dependencies installs anything again.
build() {
    find_uv
    if [[ ! -x $VENV/bin/python ]]; then
        call "$uv" venv --allow-existing --python "${PYTHON_VERSION:-3.12}" "$VENV"
    fi
    call "$uv" pip install --python "$VENV/bin/python" --editable ".[gcp]" "$JAX_PACKAGE"
}

is_installed() {
    [[ $(cat "$VENV/installed" 2>/dev/null) == "$wanted" ]]
}

# A folder is made by one worker only, on any file system.
install() {
    local waited=0
    # With its path: a copy of it elsewhere would not work.
    wanted="$VENV $JAX_PACKAGE $(cksum <setup.cfg)"
    until is_installed; do
        if [[ -n $dry_run ]]; then
            build
            return
        elif mkdir "$VENV.lock" 2>/dev/null; then
            trap 'rmdir "$VENV.lock"' EXIT
            is_installed || build
            echo "$wanted" >"$VENV/installed"
            rmdir "$VENV.lock"
            trap - EXIT
        elif [[ $((waited += 1)) -gt 1800 ]]; then
            fail "the worker that installs has not ended in half an hour; if it is gone," \
                "delete $VENV.lock."
        else
            sleep 1
        fi
    done
}

signals=0
child=
pass_on() {
    signals=$((signals + 1))
    kill -TERM "$child" 2>/dev/null || true
}

# Runs a command in the background, since bash would hold a signal back until it ends.
run() {
    local before code
    "$@" &
    child=$!
    while :; do
        before=$signals code=0
        wait "$child" || code=$?
        # Otherwise a signal has ended the wait and not the command.
        [[ $signals -gt $before ]] || return "$code"
    done
}

[[ $subcommand == install ]] || check_job "$subcommand" "$@"
install
[[ $subcommand != install ]] || exit 0
trap pass_on TERM
IFS=, read -ra stages <<<"$subcommand"
for stage in "${stages[@]}"; do
    command=(env "DTRAK_DISTRIBUTED=${DTRAK_DISTRIBUTED-1}" "$VENV/bin/dtrak-jax"
        "$stage" "$@")
    if [[ -n $dry_run ]]; then
        call "${command[@]}"
        continue
    fi
    say "dtrak-jax $stage"
    run "${command[@]}"
    # Stopped, and to be continued, though this stage had come to its end.
    [[ $signals -eq 0 ]] || exit 130
done
