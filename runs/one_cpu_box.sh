#!/bin/sh
# A chat model on the computer you have, from an empty folder, with twenty minutes of training.
#
# Each command writes a model folder under ~/.nanoghost/models and can be stopped at any moment: Ctrl-C saves and ends with 0, and
# the same command goes on where it was. So this file can be started again as often as it takes.
set -e

# What does this computer do well? How long would it take?
nanoghost doctor
nanoghost plan --minutes 10

# Learn to continue text, then to answer, then from attempts at problems that can be checked.
nanoghost pretrain --data plays --name base --minutes 10
nanoghost sft base --name chat --minutes 6
nanoghost rl chat --name better --minutes 4

# How good is it? Then talk to it.
nanoghost eval better
nanoghost chat better --prompt "Who are you?"

# One process with a thread for each core is right for one box: several processes learn the same and are not much faster
# (docs/scale.md has the figures). On a box with two sockets, a process for each keeps memory near:
#
#   torchrun --standalone --nproc-per-node 2 -m nanoghost pretrain --data plays --name base --minutes 10
