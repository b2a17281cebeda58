#!/usr/bin/env bash
# Trains on a TPU pod slice of Google Cloud, and restarts after preemptions until training has finished:
#
#   TPU=lattejax ZONE=us-west4-a TYPE=v5litepod-16 launch/tpu_pod.sh --config=configs/imagenet256.py --workdir=gs://…
#
# Needs gcloud, logged in, with a project set. The config's weights and latents must be accessible on every host: in a
# bucket that SETUP mounts, or copied there by it. Environment variables:
#   TPU      the slice's name; it is created if there is none
#   ZONE     its zone
#   TYPE     its accelerator type: v5litepod-16 is v5e:4x4, v5litepod-256 v5e:16x16, v6e-16, v5p-32 (16 chips)
#   VERSION  its software version; the default suits TYPE
#   SPOT     1 (the default) for a slice that may be preempted, 0 for one that may not
#   SETUP    a command that each host runs before training
#   PYTHON   the Python version to install on each host, whose own is too old; the default is this machine's version, so
#            that the pod gets the same JAX and compiler that plans are made with here
set -uo pipefail
: "${TPU:?is the name of the slice}" "${ZONE:?is the zone of the slice}" "${TYPE:?is the accelerator type}"
case $TYPE in
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    *) default=tpu-ubuntu2204-base ;;
esac
version=${VERSION:-$default} spot=${SPOT:-1} setup=${SETUP:-true} python=${PYTHON:-$(python3 -c 'import platform; print(platform.python_version())')} pause=${PAUSE:-60}
notice=http://metadata.google.internal/computeMetadata/v1/instance/preempted
cd "$(dirname "$0")/.."

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --quiet; }

state() { tpu describe "$TPU" --format="value(state)" 2>/dev/null || echo MISSING; }

# Makes sure that a slice is ready, a new one if it was preempted; fails if none is available now.
acquire() {
    case $(state) in
        READY) ;;
        MISSING) create ;;
        PREEMPTED | TERMINATED) tpu delete "$TPU"; create ;;
        *) return 1 ;;  # it is being created or repaired
    esac
}

# This directory's files, null-terminated, without data, environments and what was made here. Only files: tar fails if a
# directory changes.
files() {
    find . \( -name '.?*' -o -name __pycache__ -o -type d -exec test -e {}/pyvenv.cfg \; -o -path ./runs -o -path ./weights \
        -o -path ./latents -o -path ./pictures -o -path ./exported -o -path ./tpu_compiler -o -path ./build -o -path ./dist \) \
        -prune -o ! -type d -print0
}

# Installs this directory's lattejax on every host, with a Python for it.
install() {
    files | tar --null -T - -czf "$archive" || return
    tpu scp "$archive" "$TPU:lattejax.tar.gz" --worker=all || return
    tpu ssh "$TPU" --worker=all --command="mkdir -p lattejax && tar -xzf lattejax.tar.gz -C lattejax && cd lattejax &&
        python3 -m pip install -q --user uv && uv=~/.local/bin/uv && \$uv venv -q --allow-existing --python=$python ~/env &&
        \$uv pip install -q --python=\$HOME/env/bin/python -e '.[tpu,data,gcs]' && $setup"
}

create() {
    local options=(--accelerator-type="$TYPE" --version="$version")
    [[ $spot == 1 ]] && options+=(--spot)
    tpu create "$TPU" "${options[@]}"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
while true; do
    if ! acquire; then
        echo "the slice is not available now; trying again"
        sleep "$pause"
        continue
    fi
    install && tpu ssh "$TPU" --worker=all \
        --command="cd lattejax && ~/env/bin/python -m lattejax.train --cluster=auto --preemption_notice=$notice $(printf '%q ' "$@")"
    code=$?
    case $code in
        0) exit 0 ;;
        75) echo "saved; restarting" ;;
        *)
            # A preempted slice closes connections, and so do hosts that have lost another host.
            if [[ $(state) == READY ]]; then
                echo "exit code $code on a healthy slice: see above" >&2
                exit $code
            fi
            echo "the slice is gone (exit code $code); restarting"
            ;;
    esac
    sleep "$pause"
done
