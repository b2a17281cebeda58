#!/usr/bin/env bash
# Trains on GPUs under SLURM, one process per GPU:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh --config=configs/imagenet256.py --workdir=…
#
# The environment with lattejax must be active when sbatch is called, and --workdir on a disk that all nodes share.
# Two minutes before the time limit, and on preemption, every process gets SIGTERM, saves, and exits with 75; the job is
# then requeued and resumes.
#SBATCH --job-name=lattejax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --time=24:00:00
set -uo pipefail

srun --kill-on-bad-exit=0 python -m lattejax.train --cluster=auto "$@"
code=$?
if [[ $code == 75 ]]; then
    echo "saved; requeueing"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit $code
