# shellcheck shell=bash disable=SC2154
# Sourced by the launchers, which define usage() and root first. Written for bash 3.2,
# which macOS has. Reads --help, --dry-run and the subcommand from the script's own arguments,
# and leaves what follows in "$@".

dry_run=
subcommand=
while [[ $# -gt 0 ]]; do
    case $1 in
        --help | -h) usage && exit ;;
        --dry-run) dry_run=1 ;;
        *) [[ -z $subcommand ]] || break && subcommand=$1 ;;
    esac
    shift
done

# What call() shows goes here, also from within $(...).
exec 3>&1

say() {
    echo "${0##*/}: $*" >&2
}

# 2, as dtrak-jax exits where a setting is wrong: to try again would not help.
fail() {
    say "$*"
    exit 2
}

# need NAME MEANING EXAMPLE: the environment must have it.
need() {
    [[ -n ${!1:-} ]] || fail "$1 is not set: $2, such as $1=$3. --help lists all settings."
}

# quote WORD...: one line that a shell reads as these words.
quote() {
    local word separator="" mark="'" escaped="'\\''"
    for word; do
        if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
            word=$mark${word//$mark/$escaped}$mark
        fi
        printf '%s%s' "$separator" "$word"
        separator=" "
    done
}

# call COMMAND...: runs it; with --dry-run only shows it.
call() {
    if [[ -n $dry_run ]]; then
        quote "$@" >&3
        echo >&3
    else
        "$@"
    fi
}

# check_job STAGES CONFIG --workdir DIR ...: sets workdir.
check_job() {
    local argument previous=""
    [[ $# -ge 2 ]] || fail "name stages and a config, such as" \
        "train,sample configs/cifar2.py --workdir gs://BUCKET/cifar2."
    [[ -f $root/$2 ]] || fail "there is no config $2 in $root."
    workdir=
    for argument; do
        case $previous in --workdir) workdir=$argument ;; esac
        case $argument in --workdir=*) workdir=${argument#*=} ;; esac
        previous=$argument
    done
    [[ -n $workdir ]] || fail "--workdir is missing: name a folder for the results," \
        "such as --workdir gs://BUCKET/cifar2."
}

# The workers of a slice share no disk.
check_bucket() {
    [[ $workdir == gs://* ]] || fail "--workdir is $workdir, which is another folder on" \
        "every worker; it must be on Cloud Storage, such as --workdir gs://BUCKET/cifar2."
}

# with_settings COMMAND...: the command with what worker.sh reads on TPUs, quoted.
with_settings() {
    local name settings=("JAX_PACKAGE=jax[tpu]")
    for name in TFDS_DATA_DIR JAX_COMPILATION_CACHE_DIR DTRAK_TRACEBACK; do
        [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
    done
    quote env "${settings[@]}" "$@"
}
