"""Bits per byte: how well a model predicts text, whatever its tokenizer."""

import math

import torch

from nanoghost import machine
from nanoghost.data.batches import windows


@torch.no_grad()
def bits_per_byte(model, tokens, context: int, text_bytes: float) -> float:
    """Each token of the stream after the first is scored once, in non-overlapping windows of `context` tokens.

    `text_bytes`: length in bytes of the text that the tokens encode.
    """
    nats = 0.0
    for inputs, targets in windows(tokens, context):
        device = machine.device()
        nats -= model.logprobs(inputs.to(device), targets.to(device)).double().sum().item()
    return nats / math.log(2) / text_bytes
