#!/usr/bin/env bash
# Trains on a slice of a TPU pod, with gcloud:
#   launch/tpu_pod.sh create                 makes the slice
#   launch/tpu_pod.sh copy                   copies the committed files of this repository to all its hosts and installs them
#   launch/tpu_pod.sh run ARGUMENT ...       runs python -m jaxllm.train ARGUMENT ... on all of them
#   launch/tpu_pod.sh delete                 gives the slice back, which ends what it costs
# Edit these, or set them in the environment.
: "${TPU_NAME:=jaxllm}"
: "${ZONE:=us-central2-b}"
: "${ACCELERATOR_TYPE:=v4-32}"
: "${RUNTIME_VERSION:=tpu-ubuntu2204-base}"
# 3.11 or newer, as the hosts' package index has it.
: "${PYTHON_VERSION:=3.11}"

set -euo pipefail

usage() {
  echo "usage: $0 create | copy | run ARGUMENT ... | delete" >&2
  exit 2
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker=all --command "$1"
}

[ $# -ge 1 ] || usage
action="$1"
shift
case "$action" in
  create)
    gcloud compute tpus tpu-vm create "$TPU_NAME" --zone "$ZONE" --accelerator-type "$ACCELERATOR_TYPE" --version "$RUNTIME_VERSION"
    ;;
  copy)
    archive="$(mktemp -d)"
    trap 'rm -rf "$archive"' EXIT
    git archive --format=tar.gz --output "$archive/jaxllm.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "$archive/jaxllm.tar.gz" "$TPU_NAME:" --zone "$ZONE" --worker=all
    on_all "sudo apt-get install --quiet --yes python$PYTHON_VERSION python$PYTHON_VERSION-venv \
      && mkdir -p jaxllm && tar -xzf jaxllm.tar.gz -C jaxllm && cd jaxllm \
      && python$PYTHON_VERSION -m venv .venv && .venv/bin/python -m pip install --quiet --editable '.[tpu]'"
    ;;
  run)
    [ $# -ge 1 ] || usage
    printf -v arguments ' %q' "$@"
    on_all "cd jaxllm && .venv/bin/python -m jaxllm.train$arguments"
    ;;
  delete)
    gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone "$ZONE"
    ;;
  *)
    usage
    ;;
esac
