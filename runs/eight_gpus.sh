#!/bin/sh
# Train a chat model on eight GPUs in one node. The commands are the same as on one device: torchrun starts one
# process for each GPU. If a process dies, torchrun restarts all of them from the last checkpoint. Not tested on
# GPUs yet.
set -e

nanoghost plan --depth 24 --hardware 8xH100

# --max-restarts: how many times the run may lose a process. The others notice within a second if one dies, and
# after --hang-minutes if one hangs; then each writes the stacks of its threads into the model's folder and exits.
# --bad-loss roll-back: if the loss is NaN or inf, return to the last checkpoint and skip the batches up to the
# bad one.
torchrun --standalone --nproc-per-node 8 --max-restarts 10 -m nanoghost pretrain \
    --data hub:HuggingFaceFW/fineweb-edu:sample-10BT --name base --depth 24 \
    --context 2048 --vocab-size 32768 --batch 256 --micro-batch 16 --steps 14624 \
    --checkpoint-seconds 600 --keep-every 2000 --bad-loss roll-back

# A model of depth 24 fits on each GPU. For a model that does not, add --shard model (FSDP2, layer by layer).

torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m nanoghost sft base --name chat --batch 64 --minutes 30
torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m nanoghost rl chat --name better --problems 512 --minutes 60
torchrun --standalone --nproc-per-node 8 -m nanoghost eval better
