#!/usr/bin/env bash
# Trains on GPUs under SLURM, one process a GPU:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh --config=configs/imagenet256.py --workdir=…
#
# The environment that has lattejax must be active where sbatch is called, and --workdir on a disk that all nodes see.
# Two minutes before the time limit, and when the job is preempted, every process gets SIGTERM, saves, and ends with 75;
# the job is then queued again and goes on.
#SBATCH --job-name=lattejax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --time=24:00:00
set -uo pipefail

srun --kill-on-bad-exit=0 python -m lattejax.train --cluster=auto "$@"
code=$?
if [[ $code == 75 ]]; then
    echo "saved; queueing again"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit $code
