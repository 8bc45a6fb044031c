"""A toy ghost, toy data, and a few training steps without a stage around them."""

import numpy as np
import torch

from nanoghost import distributed
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.optim.optimizer import Optimizer
from nanoghost.optim.schedule import lr_multiplier_at
from nanoghost.train.hyperparameters import pretrain_groups
from nanoghost.train.pretrain import accumulate_gradients

STEPS = 50  # of a run, for the schedule


def toy_ghost(depth: int = 2) -> Ghost:
    """The same weights on every call. Matrices that start at zero are random, so that no gradient is mere rounding
    noise."""
    torch.manual_seed(0)
    model = Ghost(GhostConfig(vocab_size=61, context=16, depth=depth, width=32, head_width=16, bigram_rows=64))
    model.character_table[:, :6] = torch.randint(1, 3, (61, 6), dtype=torch.int32)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.normal_(std=0.1)
            block.mlp.down.weight.normal_(std=0.1)
        model.head.weight.normal_(std=0.1)
    return model


def toy_tokens() -> np.ndarray:
    return np.random.default_rng(0).zipf(1.3, 3000).astype("u2") % 61


def toy_optimizer(model, dtype=torch.float32, rank=0, world_size=1) -> Optimizer:
    return Optimizer(model, pretrain_groups(model.config.width, 0.1), dtype, rank, world_size)


def train_steps(model, optimizer, batches, steps) -> list[float]:
    """The loss of each step."""
    losses = []
    for step in steps:
        local_loss = accumulate_gradients(model, *batches.at(step), micro_batch=4)
        losses.append(distributed.all_reduce_mean(local_loss))
        optimizer.step(lr_multiplier_at(step / STEPS))
    return losses


def flat_parameters(model) -> torch.Tensor:
    return torch.cat([p.detach().cpu().float().flatten() for p in model.parameters()])
