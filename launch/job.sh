#!/usr/bin/env bash
# Keeps a command running on a TPU VM without the session that started it.
set -euo pipefail

usage() {
    cat <<'END'
usage: job.sh start COMMAND...   start it, unless it is running already
       job.sh status             "job: running", "job: exit CODE", "job: lost" or "job: none"

What it prints goes to ~/dtrak_jax_job/log. A job is lost where it was killed together with
what waits for it, as when its machine starts anew.
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/settings.sh"
here=$PWD
mkdir -p ~/dtrak_jax_job
cd ~/dtrak_jax_job

# The lock is held by the job and by whatever it has started, and ends with the last of them.
is_running() {
    ! flock --nonblock lock true
}

start() {
    local line
    line=$(quote "$@")
    if is_running; then
        [[ $(cat line) == "$line" ]] || fail "another job is running: $(cat line)"
        return
    fi
    rm -f exit
    echo "$line" >line
    # Without the session's outputs, which would keep it open. Single quotes: it is the
    # inner shell that expands.
    # shellcheck disable=SC2016
    setsid flock lock bash -c '
        (cd "$0" && "$@") || code=$?
        echo "${code:-0}" >exit.partial && mv exit.partial exit
    ' "$here" "$@" >>log 2>&1 </dev/null 3>&- &
    until [[ -e exit ]] || is_running; do sleep 0.1; done
}

status() {
    if is_running; then
        echo "job: running"
    elif [[ -e exit ]]; then
        echo "job: exit $(cat exit)"
    elif [[ -e line ]]; then
        echo "job: lost"
    else
        echo "job: none"
    fi
}

case $subcommand in
    start | status) "$subcommand" "$@" ;;
    *) usage >&2 && exit 2 ;;
esac
