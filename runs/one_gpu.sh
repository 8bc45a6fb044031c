#!/bin/sh
# One GPU, and text of the Hub. Not run by us on a GPU yet; `plan` says what to expect.
set -e

pip install 'nanoghost[hub]'

# Look before you pay: parameters, memory, hours, dollars, and the command that belongs to them.
nanoghost plan --depth 10 --hardware H100

# Depth is the dial. If the rows of a step do not fit into memory at once, the first step notices and takes fewer at a time;
# --micro-batch says it beforehand. A checkpoint every five minutes is written beside the training; the last two and the one with
# the lowest loss stay.
nanoghost pretrain --data hub:HuggingFaceFW/fineweb-edu:sample-10BT --name base --depth 10 \
    --context 2048 --vocab-size 32768 --batch 64 --steps 20000 --checkpoint-seconds 300

nanoghost sft base --name chat --minutes 20
nanoghost rl chat --name better --minutes 20
nanoghost eval better
