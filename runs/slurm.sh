#!/bin/sh
# Pretrain on eight nodes of eight GPUs under Slurm: sbatch runs/slurm.sh. Not tested on a cluster yet.
# tests/test_hosts.py tests that two hosts find each other and get the result of one host, over a network that
# loses packets.
#
#SBATCH --job-name=nanoghost
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#
# Slurm sends SIGTERM to all processes five minutes before the time limit: they finish the step, save, and exit
# with 0. When the job is requeued, or you submit it again, the same command resumes at that step, also with
# another number of nodes: the checkpoint is sharded anew, and the batches do not depend on the number of
# processes.
set -e

# All nodes must see this folder; rank 0 writes it.
export NANOGHOST_HOME="${NANOGHOST_HOME:-$HOME/.nanoghost}"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 10 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m nanoghost pretrain --data hub:HuggingFaceFW/fineweb-edu:sample-100BT --name base --depth 32 \
    --context 2048 --vocab-size 32768 --batch 512 --steps 30000 --checkpoint-seconds 600 --bad-loss roll-back
