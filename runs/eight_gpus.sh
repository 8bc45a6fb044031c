#!/bin/sh
# Eight GPUs in one node. The verbs are the same; torchrun starts a process for each GPU, and starts all of them again, at the last
# checkpoint, when one has died. Not run by us on GPUs yet.
set -e

nanoghost plan --depth 24 --hardware 8xH100

# --max-restarts: how often the run may lose a process. The others notice by themselves, within a second of the death of one, or
# after --hang-minutes if it only stands still; then each writes into the model's folder where it stood.
# --bad-loss roll-back: if a loss is no number, go back to the last checkpoint and on with the batches behind the bad ones.
torchrun --standalone --nproc-per-node 8 --max-restarts 10 -m nanoghost pretrain \
    --data hub:HuggingFaceFW/fineweb-edu:sample-10BT --name base --depth 24 \
    --context 2048 --vocab-size 32768 --batch 256 --micro-batch 16 --steps 14624 \
    --checkpoint-seconds 600 --keep-every 2000 --bad-loss roll-back

# The weights of a depth-24 model fit on each GPU. Those of a model that do not are shared out, layer by layer: add --shard model.

torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m nanoghost sft base --name chat --batch 64 --minutes 30
torchrun --standalone --nproc-per-node 8 --max-restarts 3 -m nanoghost rl chat --name better --problems 512 --minutes 60
torchrun --standalone --nproc-per-node 8 -m nanoghost eval better
