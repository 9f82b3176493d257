#!/bin/bash
# sbatch scripts/launch/slurm.sh RECIPE [options of train_deit.py], from the folder of train_deit.py.
# Starts the run, or resumes it if the job was requeued.
#SBATCH --job-name=deit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64   # eight per GPU, or what your nodes have
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One launcher per node. SIGTERM, three minutes before the time ends, saves a checkpoint of the current
# step; the same sbatch then resumes.
# srun needs the cores again: it does not take them from sbatch (since SLURM 22.05).
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${DEIT_PORT:-29500}" \
  train_deit.py "$@" --resume
