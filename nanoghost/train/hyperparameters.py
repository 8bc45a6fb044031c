"""The dial: `--depth`, or `--minutes` on this machine, determines all other hyperparameters."""

from dataclasses import replace

from nanoghost import hardware
from nanoghost.errors import UserError
from nanoghost.formats.model_card import ModelCard
from nanoghost.optim.optimizer import UpdateRule

# The shortest run in which a depth reaches a lower loss than the next smaller one: depth -> minutes on a machine with
# REFERENCE_GFLOPS_PER_SECOND. Measured up to depth 4 (docs/results), extrapolated beyond.
MIN_MINUTES_FOR_DEPTH = {2: 0.0, 3: 2.2, 4: 8.0, 6: 60.0, 8: 240.0, 12: 3000.0}
REFERENCE_GFLOPS_PER_SECOND = 380.0  # matmul GFLOP/s of two Zen 4 cores in bf16
# Matmuls of the sizes of training do not reach the peak of AMX: with 1,500 GFLOP/s measured on two cores, a step takes
# half the time of two Zen 4 cores (5,546 and 2,664 tokens/s at depth 6), not a quarter.
MAX_GFLOPS_PER_SECOND_PER_CORE = 380.0
DEFAULT_DEPTH = 4
MIN_MINUTES_TO_COMPILE = 15


def usable_gflops_per_second(measured: float) -> float:
    """The matmul throughput that training can use, of what was measured on this machine."""
    if hardware.device().type == "cpu":
        return min(measured, hardware.threads() * MAX_GFLOPS_PER_SECOND_PER_CORE)
    return measured


def depth_for(minutes: float | None, gflops_per_second: float = REFERENCE_GFLOPS_PER_SECOND) -> tuple[int, str]:
    """(depth, reason): the depth with the lowest loss after `minutes` of training at this matmul throughput."""
    if minutes is None:
        return DEFAULT_DEPTH, f"depth {DEFAULT_DEPTH} is the default where no minutes are given"
    reference_minutes = minutes * gflops_per_second / REFERENCE_GFLOPS_PER_SECOND
    depth = max(d for d, min_minutes in MIN_MINUTES_FOR_DEPTH.items() if min_minutes <= reference_minutes)
    return depth, f"depth {depth} learns most in {minutes:g} minutes at {gflops_per_second:.0f} GFLOP/s"


# -- optimizer settings of each parameter group -----------------------------------------------------------------------

LORA_GROUP = UpdateRule("adamw", 5e-4, beta1=0.9, beta2=0.99)
ADOPTED_GROUP = UpdateRule("adamw", 3e-5, beta1=0.9, beta2=0.99)


def pretrain_groups(width: int, scale: float = 1.0, adamw_scale: float = 1.0) -> dict[str, UpdateRule]:
    """Optimizer settings by parameter group, tuned at width 256. The learning rates of the head and of the embedding
    tables are proportional to 1 / sqrt(width).

    `scale` (--learning-rate) multiplies all learning rates, `adamw_scale` those of AdamW in addition.
    """
    adamw = scale * adamw_scale * (256 / width) ** 0.5
    return {
        "matrices": UpdateRule("muon", 0.03 * scale, beta1=0.95, weight_decay=0.1),
        "head": UpdateRule("adamw", 0.012 * adamw),
        "embeddings": UpdateRule("adamw", 0.3 * adamw),
        "bigram_embedding": UpdateRule("adamw", 0.15 * adamw),
        "scalars": UpdateRule("adamw", 0.02 * scale * adamw_scale),
    }


def finetune_groups(root: ModelCard, width: int, scale: float = 1.0, adamw_scale: float = 1.0) -> dict[str, UpdateRule]:
    """Optimizer settings for training a model further; `root` is the card of the pretrained model that it descends
    from.

    Models that were pretrained here continue with the settings of pretraining. Adopted models and LoRA adapters need
    AdamW with small learning rates.
    """
    if root.stage == "adopt":
        groups = dict.fromkeys(("matrices", "head", "embeddings", "scalars"), scaled(ADOPTED_GROUP, scale))
    else:
        groups = pretrain_groups(width, scale, adamw_scale)
    return groups | {"lora": scaled(LORA_GROUP, scale)}


def scaled(group: UpdateRule, scale: float) -> UpdateRule:
    return replace(group, learning_rate=group.learning_rate * scale)


# -- context, compilation ---------------------------------------------------------------------------------------------


def finetune_context(model_context: int, requested: int | None = None) -> int:
    """Tokens in a packed training row: 512 unless requested otherwise, and at most the context of the model.

    The cost of attention grows with the row: at 512 it is a sixth of a step of a small Llama, at 8192 most of it.
    """
    return min(model_context, requested or 512)


def compile_decision(requested: str, minutes: float | None) -> dict:
    """{"on": bool, "reason": str}. Compiling takes a minute on two cores and makes a step about 20% faster."""
    if requested == "off":
        return {"on": False, "reason": "--compile off"}
    if not hardware.has_compiler():
        if requested == "on":
            raise UserError("--compile on needs a C++ compiler (g++ or clang++, or the one that CXX names)")
        return {"on": False, "reason": "there is no C++ compiler"}
    if requested == "on":
        return {"on": True, "reason": "--compile on"}
    if minutes is not None and minutes > MIN_MINUTES_TO_COMPILE:
        return {"on": True, "reason": "it pays off in a run this long"}
    return {"on": False, "reason": "a run this short would not repay it"}
