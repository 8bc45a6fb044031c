#!/bin/sh
# Train a chat model on one GPU, with text from the Hugging Face Hub. Not tested on a GPU yet; `plan` says what to
# expect.
set -e

pip install 'nanoghost[hub]'

# Before you rent a GPU: parameters, memory, hours, dollars, and the command to run.
nanoghost plan --depth 10 --hardware H100

# --depth is the dial: it sets width, heads and learning rates. If a micro-batch does not fit into memory, the
# first step halves it; --micro-batch sets it. A checkpoint is written in the background every five minutes; the
# last two and the one with the lowest loss are kept.
nanoghost pretrain --data hub:HuggingFaceFW/fineweb-edu:sample-10BT --name base --depth 10 \
    --context 2048 --vocab-size 32768 --batch 64 --steps 20000 --checkpoint-seconds 300

nanoghost sft base --name chat --minutes 20
nanoghost rl chat --name better --minutes 20
nanoghost eval better
