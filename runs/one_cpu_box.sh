#!/bin/sh
# Train a chat model on this computer, from an empty folder, with twenty minutes of training.
#
# Each command writes a model folder under ~/.nanoghost/models and can be interrupted: Ctrl-C saves and exits with
# 0, and the same command resumes. So this script can be stopped and run again at any time.
set -e

# Measure this computer; estimate the training time.
nanoghost doctor
nanoghost plan --minutes 10

# Pretraining on text, supervised fine-tuning on conversations, RL on tasks with verifiable answers.
nanoghost pretrain --data plays --name base --minutes 10
nanoghost sft base --name chat --minutes 6
nanoghost rl chat --name better --minutes 4

# Evaluate the model, then ask it something.
nanoghost eval better
nanoghost chat better --prompt "Who are you?"

# On one CPU use one process with a thread for each core: several processes give the same losses and are not faster
# (figures in docs/scale.md). With two sockets, one process for each socket keeps memory accesses local:
#
#   torchrun --standalone --nproc-per-node 2 -m nanoghost pretrain --data plays --name base --minutes 10
