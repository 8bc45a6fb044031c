"""Toy models of both families, with random weights everywhere."""

from dataclasses import replace

import torch

from nanoghost.model.character_features import (
    FIRST_BYTE,
    FIRST_CLASS,
    LENGTH,
    MAX_TOKEN_BYTES,
    single_character_tokens,
)
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.registry import new_model

V = 300
GHOST = GhostConfig(vocab_size=V, context=24, depth=3, width=32, head_width=16, bigram_rows=101)
LLAMA = LlamaConfig(vocab_size=V, context=24, depth=3, width=32, heads=4, key_value_heads=2, mlp_width=48)
CONFIGS = {"ghost": GHOST, "llama": LLAMA, "tied llama": replace(LLAMA, tied_embeddings=True)}


def untrained_model(config):
    torch.manual_seed(0)
    return new_model(config)


def trained_model(config):
    """As if trained: weights that start as zeros or ones are random, so that every part reaches the scores."""
    model = untrained_model(config)
    with torch.no_grad():
        for p in model.parameters():
            is_constant = p.unique().numel() <= 3  # zeros, ones, a residual mix, the biases of the gates
            if is_constant:
                p.add_(torch.randn_like(p) * 0.3)
        model.head_weight.mul_(0.5 / model.head_weight.std())
    if isinstance(model, Ghost):
        table = model.character_table
        table[:, LENGTH] = torch.randint(1, 5, (V,))
        table[:, FIRST_CLASS:FIRST_BYTE] = torch.randint(3, (V, 2))
        table[:, FIRST_BYTE:] = torch.randint(256, (V, MAX_TOKEN_BYTES))
        model.character_tokens.copy_(single_character_tokens(table))
    return model.requires_grad_(False)


def random_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))
