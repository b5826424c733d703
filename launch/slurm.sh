#!/bin/bash
# One process a host under Slurm: sbatch --nodes=2 launch/slurm.sh --config=distill/coco_folder:mkd --workdir=/shared/mkd
# kdjax finds the other hosts through Slurm. Docs: docs/several_hosts.md
#SBATCH --job-name=kdjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=kdjax-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM two minutes before the time is over: every host saves the same step and ends with code 143.
#SBATCH --signal=TERM@120
set -u

RESTARTS=${RESTARTS:-20} # of the whole job

# --kill-on-bad-exit=0: the other hosts say themselves which one is lost, and leave within two minutes.
srun --kill-on-bad-exit=0 kdjax train --multihost "$@"
code=$?

# 75: a host was lost; 128 + n: ended by signal n (143 is SIGTERM, after a save). Anything else is final.
if [ "$code" -eq 75 ] || { [ "$code" -gt 128 ] && [ "$code" -ne 130 ]; }; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
    echo "code $code: the job is queued again (restart $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $RESTARTS)"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
