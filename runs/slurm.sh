#!/bin/sh
# Eight nodes of eight GPUs under Slurm: sbatch runs/slurm.sh. Not run by us on such a cluster yet; that two hosts find each other,
# and finish over a bad network with the result of one, is tested in tests/test_hosts.py.
#
#SBATCH --job-name=nanoghost
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#
# Five minutes before its time is over Slurm sends SIGTERM to all processes: they finish the step, save, and end with 0. Requeued,
# or started again by you, with as many nodes as there are then, the same command goes on at that step: checkpoints are shared out
# anew, and the batches are the same whatever the number of processes.
set -e

# All nodes must see this folder; one of them writes it.
export NANOGHOST_HOME="${NANOGHOST_HOME:-$HOME/.nanoghost}"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 10 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m nanoghost pretrain --data hub:HuggingFaceFW/fineweb-edu:sample-100BT --name base --depth 32 \
    --context 2048 --vocab-size 32768 --batch 512 --steps 30000 --checkpoint-seconds 600 --bad-loss roll-back
