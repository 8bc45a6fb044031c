"""The dial: from `--depth`, or from `--minutes` on this machine, to every other setting."""

from dataclasses import replace

from nanoghost import hardware
from nanoghost.errors import UserError
from nanoghost.model.ghost import GhostConfig
from nanoghost.model.registry import architecture
from nanoghost.optim.optimizer import Group

MINUTES_OF_DEPTH = {
    2: 0.0,
    3: 2.2,
    4: 8.0,
    6: 60.0,
    8: 240.0,
    12: 3000.0,
}  # at REFERENCE, as two Zen 4 cores have it; measured to 4
REFERENCE = 380.0  # GFLOP/s of matrix products


def depth_for(minutes: float | None, gflops_per_second: float = REFERENCE) -> tuple[int, str]:
    """(depth, reason) for the time one is willing to wait, where matrix products run at this rate."""
    if minutes is None:
        return 4, "depth 4 is the default where no minutes are given"
    depth = max(d for d, least in MINUTES_OF_DEPTH.items() if least <= minutes * gflops_per_second / REFERENCE)
    return depth, f"depth {depth} learns most in {minutes:g} minutes at {gflops_per_second:.0f} GFLOP/s"


def model_config(arch: str, depth: int, vocab_size: int, context: int):
    """Width is 64 x depth, in heads of 64."""
    width = 64 * depth
    if arch == "llama":
        return architecture("llama")[0](vocab_size, context, depth, width, depth, depth, -(-width * 8 // 3 // 64) * 64)
    return GhostConfig(vocab_size=vocab_size, context=context, depth=depth, width=width)


LORA = Group("adamw", 5e-4, beta1=0.9, beta2=0.99)
ADOPTED = Group("adamw", 3e-5, beta1=0.9, beta2=0.99)


def later_groups(base: dict, width: int, scale: float, adamw: float = 1.0) -> dict[str, Group]:
    """For what grows from the base model of that card: ours go on as they were pretrained; what others trained, and
    adapters, take AdamW's small steps."""
    if base["stage"] == "adopt":
        own = dict.fromkeys(("matrices", "head", "embeddings", "scalars"), scaled(ADOPTED, scale))
    else:
        own = groups(width, scale, adamw)
    return own | {"lora": scaled(LORA, scale)}


def scaled(group: Group, scale: float) -> Group:
    return replace(group, learning_rate=group.learning_rate * scale)


def row_length(context: int, asked: int | None = None) -> int:
    """Tokens in a row of a model of that context: attention over 512 costs a sixth of a small Llama's step, over 8192 most."""
    return min(context, asked or 512)


def groups(width: int, scale: float = 1.0, adamw: float = 1.0) -> dict[str, Group]:
    """Learning rates: tuned at width 256; those of the head and of tables shrink with the root of the width, the others need no such care.

    `adamw` is a further factor on what AdamW updates.
    """
    adam = scale * adamw * (256 / width) ** 0.5
    return {
        "matrices": Group("muon", 0.03 * scale, beta1=0.95, weight_decay=0.1),
        "head": Group("adamw", 0.012 * adam),
        "embeddings": Group("adamw", 0.3 * adam),
        "ngrams": Group("adamw", 0.15 * adam),
        "scalars": Group("adamw", 0.02 * scale * adamw),
    }


def compile_decision(asked: str, minutes: float | None) -> dict:
    """Compiling costs about a minute on two cores and makes a step about a fifth faster."""
    if asked == "off":
        return {"on": False, "reason": "as asked"}
    if not hardware.has_compiler():
        if asked == "on":
            raise UserError("--compile on needs a C++ compiler (g++ or clang++, or the one that CXX names)")
        return {"on": False, "reason": "there is no C++ compiler"}
    if asked == "on":
        return {"on": True, "reason": "as asked"}
    pays = minutes is not None and minutes > 15
    return {"on": pays, "reason": "it pays in a run this long" if pays else "it would not pay in a run this short"}
