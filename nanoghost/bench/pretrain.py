"""`nanoghost bench pretrain`: speed and MFU (model FLOPs utilization) of pretraining, by depth and batch size.

A step is the same as in `nanoghost pretrain`: fetch a batch, forward, backward, optimizer with its Newton-Schulz
iterations. MFU counts the FLOPs of `flops_per_token` (matmuls and causal attention) over the time of the whole step.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanoghost import hardware
from nanoghost.bench.harness import Workload, measure_and_report, measure_limits
from nanoghost.commands.arguments import parse_numbers
from nanoghost.data.batches import Batches
from nanoghost.data.registry import open_data_source
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.errors import UserError
from nanoghost.evals.svg import log_x_line_chart
from nanoghost.home import write_atomic
from nanoghost.model.registry import check_arch, config_for_depth
from nanoghost.optim.optimizer import Optimizer
from nanoghost.progress import Display, JsonFlag
from nanoghost.tasks.sft_mix import example_texts
from nanoghost.train.hyperparameters import pretrain_groups
from nanoghost.train.pretrain import accumulate_gradients, make_model


@dataclass(frozen=True)
class PretrainBenchSettings(JsonFlag):
    depths: str = "2,4,6,8"
    """Numbers of layers, comma-separated; they set all other sizes of a model."""
    batches: str = "16"
    """Numbers of rows in a step, comma-separated."""
    arch: str = "ghost"
    """Architecture: ghost or llama."""
    data: str = "plays"
    """Text, as in `pretrain`."""
    vocab_size: int = 4096
    """Vocabulary size of the tokenizer."""
    context: int = 256
    """Tokens in a row."""
    steps: int = 4
    """Steps in a measurement."""
    rounds: int = 3
    """Number of measurements."""
    out: Path | None = None
    """Write a chart of MFU by model size to this SVG file."""


def command(settings: PretrainBenchSettings) -> None:
    hardware.prepare()
    check_arch(settings.arch)
    depths = parse_numbers("--depths", settings.depths)
    batch_sizes = parse_numbers("--batches", settings.batches)
    if min(settings.steps, settings.rounds) < 1:
        raise UserError("--steps and --rounds must be at least 1")
    source = open_data_source(settings.data)
    tokenizer = load_or_train_tokenizer(source, settings.vocab_size, Display().print, example_texts())
    text = tokenize_source(source, tokenizer).tokens("train")
    limits = measure_limits()
    workloads = []
    matmul_millions = {}  # workload name -> millions of parameters in matmuls
    for depth in depths:
        model = make_model(config_for_depth(settings.arch, depth, tokenizer.vocab_size, settings.context), tokenizer)
        optimizer = Optimizer(model, pretrain_groups(model.config.width), hardware.compute_dtype())
        counts = model.parameter_counts()
        in_matmuls = (counts["matrices"] + counts["head"]) / 1e6
        name = f"depth {depth}: {in_matmuls:.1f}M of {sum(counts.values()) / 1e6:.1f}M in matmuls"
        matmul_millions[name] = in_matmuls
        limit = limits.flops_per_second / model.flops_per_token(settings.context)
        for rows in batch_sizes:
            run = partial(run_steps, model, optimizer, Batches(text, settings.context, rows, 0), settings.steps)
            workloads.append(Workload(settings.arch, name, rows, run, limit))
    results = measure_and_report(workloads, settings.rounds, settings.json, limits)
    if settings.out:
        lines = {f"{rows} rows": [] for rows in batch_sizes}
        for result in results:
            mfu_percent = 100 * result["fraction"]
            lines[f"{result['streams']} rows"].append((matmul_millions[result["workload"]], mfu_percent))
        title = f"MFU in {limits.dtype} (%), by parameters in matmuls"
        write_atomic(settings.out, log_x_line_chart(title, lines, "M"))


def run_steps(model, optimizer: Optimizer, batches: Batches, steps: int) -> float:
    """Train with a learning rate of 0, so that the weights keep their initial values; returns tokens per second."""
    start = time.perf_counter()
    for step in range(steps):
        accumulate_gradients(model, *batches.at(step), batches.rows)
        optimizer.step(0.0)
    return steps * batches.rows * batches.context / (time.perf_counter() - start)
