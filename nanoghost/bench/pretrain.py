"""`nanoghost bench pretrain`: how near a whole step of pretraining comes to the matrix peak of this machine, by size and batch.

A step is what the stage does: a batch, forward, backward, the optimizer with its Newton-Schulz iterations. Operations count as in
`flops_per_token`: matrix products and causal attention, nothing else, so the optimizer's time counts and its operations do not.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from nanoghost import hardware
from nanoghost.bench.table import limits, tell
from nanoghost.commands.arguments import parse_numbers
from nanoghost.data.batches import Batches
from nanoghost.data.registry import open_source
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.errors import UserError
from nanoghost.evals.svg import log_x_line_chart
from nanoghost.home import write_atomic
from nanoghost.model.registry import check_arch, config_for_depth
from nanoghost.optim.optimizer import Optimizer
from nanoghost.progress import Display
from nanoghost.tasks.sft_mix import example_texts
from nanoghost.train.hyperparameters import pretrain_groups
from nanoghost.train.pretrain import accumulate_gradients, make_model


@dataclass(frozen=True)
class PretrainBenchSettings:
    depths: str = "2,4,6,8"
    """Layers of the models; the dial sets the rest."""
    batches: str = "16"
    """Rows in a step."""
    arch: str = "ghost"
    """ghost or llama."""
    data: str = "plays"
    """Text, as in `pretrain`."""
    vocab_size: int = 4096
    """Tokens of the tokenizer."""
    context: int = 256
    """Tokens in a row."""
    steps: int = 4
    """Steps in a measurement."""
    rounds: int = 3
    """Times that everything is measured."""
    out: Path | None = None
    """Draw the shares into this SVG file."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: PretrainBenchSettings) -> None:
    hardware.prepare()
    check_arch(settings.arch)
    depths, rows = parse_numbers("--depths", settings.depths), parse_numbers("--batches", settings.batches)
    if min(settings.steps, settings.rounds) < 1:
        raise UserError("--steps and --rounds are at least 1")
    source = open_source(settings.data)
    tokenizer = load_or_train_tokenizer(source, settings.vocab_size, Display().print, example_texts())
    text = tokenize_source(source, tokenizer).tokens("train")
    works, operations, millions = [], {}, {}
    for depth in depths:
        model = make_model(config_for_depth(settings.arch, depth, tokenizer.vocab_size, settings.context), tokenizer)
        optimizer = Optimizer(model, pretrain_groups(model.config.width), hardware.compute_dtype())
        counts = model.parameter_counts()
        in_products = (counts["matrices"] + counts["head"]) / 1e6
        name = f"depth {depth}: {in_products:.1f}M of {sum(counts.values()) / 1e6:.1f}M in products"
        operations[name], millions[name] = model.flops_per_token(settings.context), in_products
        works += [
            (settings.arch, name, n, step_of(model, optimizer, Batches(text, settings.context, n, 0), settings.steps))
            for n in rows
        ]
    measured = limits()
    figures = tell(
        settings, measured, works, lambda work, _: measured["matrix_gflops_per_second"] * 1e9 / operations[work]
    )
    if settings.out:
        lines = {
            f"{n} rows": [(millions[f["work"]], 100 * f["share"]) for f in figures if f["streams"] == n] for n in rows
        }
        title = f"Percent of the peak in {measured['dtype']}, by parameters in products"
        write_atomic(settings.out, log_x_line_chart(title, lines, "M"))


def step_of(model, optimizer: Optimizer, batches: Batches, steps: int):
    """Tokens a second of so many steps; nothing is learned, so that sizes stay what they are at the start."""

    def run() -> float:
        start = time.perf_counter()
        for step in range(steps):
            accumulate_gradients(model, *batches.at(step), batches.rows)
            optimizer.step(0.0)
        return steps * batches.rows * batches.context / (time.perf_counter() - start)

    return run
