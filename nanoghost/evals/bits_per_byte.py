"""Bits per byte: how well a model predicts text, comparable between tokenizers."""

import math

import torch

from nanoghost import distributed, hardware
from nanoghost.data.batches import windows
from nanoghost.optim.fsdp import is_sharded


@torch.no_grad()
def bits_per_byte(model, tokens, context: int, text_bytes: float) -> float:
    """Score each token but the first once, in non-overlapping windows of `context` tokens.

    `tokens` (N,) are those of the whole text, which is `text_bytes` bytes long. The processes share the windows, and
    each returns the result for all of them.
    """
    rank, world_size = distributed.rank_and_world_size()
    if is_sharded(model):  # a forward pass gathers the weights from all processes, so each computes every window
        rank, world_size = 0, 1
    device = hardware.device()
    nats = 0.0
    for i, (inputs_BT, targets_BT) in enumerate(windows(tokens, context)):
        if i % world_size == rank:
            nats -= model.logprobs(inputs_BT.to(device), targets_BT.to(device)).double().sum().item()
    total_nats = distributed.all_reduce_mean(nats) * world_size
    return total_nats / math.log(2) / text_bytes
