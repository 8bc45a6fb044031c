"""How a recipe of the ablations trains its model: update rules, schedules, batch sizes.

`progress` is the fraction of the run that is done, from 0 to 1.
"""

import math
from dataclasses import replace

import torch

from nanoghost.lab.ablation_model import AblationModel
from nanoghost.lab.ablation_recipes import Recipe
from nanoghost.optim.optimizer import Bucket, Optimizer, UpdateRule, orthogonalize
from nanoghost.optim.schedule import lr_multiplier_at
from nanoghost.train.hyperparameters import pretrain_groups

FINAL_MOMENTUM = 0.95


class PlainMuonBucket(Bucket):
    """Matrices updated by Muon as in Jordan et al. 2024, without NorMuon's scaling of rows."""

    def _muon_update(self, g, step: int):
        self.exp_avg.lerp_(g, 1 - self.rule.beta1)
        nesterov = g.lerp_(self.exp_avg, self.rule.beta1).to(self.compute_dtype)
        return orthogonalize(nesterov, self.iterations).float()


class AblationOptimizer(Optimizer):
    """The optimizer of a recipe. `lr_scale` multiplies all learning rates."""

    def __init__(self, model: AblationModel, lr_scale: float):
        recipe = model.recipe
        self.bucket_class = Bucket if recipe.normuon else PlainMuonBucket
        super().__init__(model, update_rules(recipe, lr_scale), getattr(torch, recipe.dtype))
        for bucket in self.buckets.values():
            bucket.iterations = recipe.muon_iterations

    def set_momentum(self, momentum: float) -> None:
        """Set Muon's momentum for the next steps."""
        for bucket in self.buckets.values():
            if bucket.is_muon:
                bucket.rule = replace(bucket.rule, beta1=momentum)


def update_rules(recipe: Recipe, lr_scale: float) -> dict[str, UpdateRule]:
    """Today's update rules with the switches of the recipe; `lr_scale` multiplies all learning rates."""
    rules = pretrain_groups(recipe.width, lr_scale)
    adamw_of_2019 = UpdateRule("adamw", rules["head"].learning_rate / 3, beta1=0.9, beta2=0.95)
    if not recipe.learning_rate_by_group:
        rules = {name: rule if rule.algorithm == "muon" else adamw_of_2019 for name, rule in rules.items()}
    if not recipe.muon:
        rules["matrices"] = adamw_of_2019
    if not recipe.normuon:
        rules["matrices"] = replace(rules["matrices"], weight_decay=0.0)
    for name in ("embeddings", "bigram_embedding"):
        rules[name] = replace(rules[name], weight_decay=recipe.table_weight_decay)
    return rules


def lr_multiplier(recipe: Recipe, progress: float) -> float:
    """Factor on the learning rates."""
    if recipe.linear_cooldown:
        return lr_multiplier_at(progress, cooldown=recipe.cooldown, floor=recipe.lr_floor)
    warmup = min(1.0, (progress + 1e-3) / 0.05)  # the first step is not lost
    cosine = 0.55 + 0.45 * math.cos(math.pi * progress)  # from 1 to 0.1
    return warmup * cosine


def momentum(recipe: Recipe, progress: float) -> float:
    """Muon's momentum: linear from the recipe's to FINAL_MOMENTUM in the first 30% of the run."""
    return recipe.initial_momentum + (FINAL_MOMENTUM - recipe.initial_momentum) * min(1.0, progress / 0.3)


def steps_for(recipe: Recipe, tokens: int) -> int:
    """Number of steps that process about this many tokens."""
    mean_ramp = 0.95 if recipe.row_ramp else 1.0  # batch_shape: 0.4 x 0.5 + 0.3 x 1 + 0.3 x 1.5
    return round(tokens / (recipe.rows * recipe.context * mean_ramp))


def batch_shape(recipe: Recipe, progress: float) -> tuple[int, int]:
    """(rows, context) of the batch at this point of the run."""
    rows, context = recipe.rows, recipe.context
    if recipe.row_ramp and progress < 0.4:
        rows //= 2
    elif recipe.row_ramp and progress >= 0.7:
        rows = rows * 3 // 2
    if recipe.context_ramp and progress < 0.4:
        rows, context = rows * 2, context // 2
    return rows, context
