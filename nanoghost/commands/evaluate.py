"""`nanoghost eval`: evaluate a model (evals/evaluate.py) and print the figures."""

import json
from dataclasses import dataclass

from nanoghost import distributed
from nanoghost.commands.arguments import ModelArgument
from nanoghost.errors import UserError
from nanoghost.evals.evaluate import evaluate
from nanoghost.home import open_model
from nanoghost.progress import Display, JsonFlag


@dataclass(frozen=True)
class EvalSettings(ModelArgument, JsonFlag):
    problems: int = 500
    """Number of held-out problems of each task."""


def command(settings: EvalSettings) -> None:
    if settings.problems < 1:
        raise UserError("--problems must be at least 1")
    display = Display()
    figures = evaluate(open_model(settings.model), settings.problems, display)
    for name, result in figures["tasks"].items():
        interval = f"95% interval {result['low']:.1%} to {result['high']:.1%}, n = {result['count']}"
        display.print(f"{name:>15}  {result['accuracy']:6.1%}  ({interval})")
    if figures["kneser_ney_bpb"]:
        baseline = f"6-gram baseline (Kneser-Ney): {figures['kneser_ney_bpb']:.3f}"
    else:
        baseline = "the model may have been trained on this text"  # adopted: its training data is unknown
    display.print(f"{'held-out bpb':>15}  {figures['bpb']:.3f}  ({baseline})")
    if settings.json and distributed.is_main_process():
        keys = ("model", "bpb", "kneser_ney_bpb", "tasks", "memorized", "seconds")
        print(json.dumps({key: figures[key] for key in keys}))
