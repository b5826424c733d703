#!/bin/bash
# A slice of a TPU pod, whose hosts jax finds by itself:
#   TPU=my-slice ZONE=europe-west4-a launch/tpu_pod.sh --config=distill/coco_folder:mkd --workdir=/shared/mkd
# Each host has kdjax[tpu] in its PATH, and the workdir on a file system that all share (Filestore over NFS).
# A preempted slice is made again by whoever made it (a queued resource); then this command continues.
# Docs: docs/several_hosts.md
set -u

: "${TPU:?set it to the name of the TPU slice}" "${ZONE:?set it to its zone}"

printf -v command '%q ' kdjax supervise -- kdjax train --multihost "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
