#!/bin/sh
#SBATCH --job-name=blsp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
# One task a node, which starts a process for each GPU. Five minutes before the end all processes get TERM and save; a job
# that is requeued or sent again goes on where it stopped.
set -eu
export NODES="$SLURM_JOB_NUM_NODES" GPUS=8
RANK0=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RANK0
srun --export=ALL sh recipes/cluster/torchrun.sh
