"""Bits per byte: how well a model predicts text, whatever its tokenizer."""

import math

import torch

from nanoghost import distributed, hardware
from nanoghost.data.batches import windows
from nanoghost.optim.fsdp import is_sharded


@torch.no_grad()
def bits_per_byte(model, tokens, context: int, text_bytes: float) -> float:
    """Each token of the stream after the first is scored once, in non-overlapping windows of `context` tokens; processes
    share the work.

    `text_bytes`: length in bytes of the text that the tokens encode.
    """
    nats, (rank, world) = 0.0, distributed.rank_and_world_size()
    if is_sharded(model):  # its weights come together for each window, so all look at each
        rank, world = 0, 1
    for i, (inputs, targets) in enumerate(windows(tokens, context)):
        if i % world == rank:
            device = hardware.device()
            nats -= model.logprobs(inputs.to(device), targets.to(device)).double().sum().item()
    return distributed.all_reduce_mean(nats) * world / math.log(2) / text_bytes
