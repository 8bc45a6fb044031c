"""The whole pipeline in one readable file. START READING HERE.

    an empty folder -> text -> tokenizer -> pretraining -> finetuning -> reinforcement -> evaluation -> report -> chat

Each stage writes a model folder of its own and can be stopped at any moment; the same command goes on where it was.
Read on in train/pretrain.py, train/sft.py and train/rl.py (a visible loop each), then model/ghost.py.
"""

import json
import time
from dataclasses import dataclass

from nanoghost import distributed, hardware
from nanoghost.evals.evaluate import evaluate
from nanoghost.evals.report import terminal_report, write_report
from nanoghost.home import ModelFolder
from nanoghost.progress import Display
from nanoghost.train import pretrain, rl, sft


@dataclass(frozen=True)
class SpeedrunSettings:
    minutes: float = 9.1
    """Minutes of training in all: 18% pretraining, 57% finetuning, 25% reinforcement."""
    data: str = "plays"
    """Text to learn: plays, a file or folder, or hub:OWNER/NAME."""
    problems: int = 200
    """Held-out problems of each skill in the evaluation (a quarter of them for the base model)."""
    seed: int = 0
    """Of everything random."""
    force: bool = False
    """Start anew although ghost-base, ghost-sft and ghost exist."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def recipe(settings: SpeedrunSettings) -> tuple:
    """The stages that train, in order, and what each is asked."""
    minutes, seed, force = settings.minutes, settings.seed, settings.force
    return (
        # 1. Learn to continue text. The tokenizer is learned on the way (data/, tokenizer.py, train/pretrain.py).
        (
            pretrain,
            pretrain.PretrainSettings(
                "ghost-base", settings.data, minutes=minutes * 0.18, dial_minutes=minutes, seed=seed, force=force
            ),
        ),
        # 2. Learn to answer: lessons in conversation, sums, spelling, and saying "I don't know" (tasks/, train/sft.py).
        (sft, sft.SftSettings("ghost-base", "ghost-sft", minutes=minutes * 0.57, seed=seed, force=force)),
        # 3. Learn from attempts: problems that can be checked, many tries at each (train/rl.py).
        (rl, rl.RlSettings("ghost-sft", "ghost", minutes=minutes * 0.25, seed=seed, force=force)),
    )


def main(settings: SpeedrunSettings) -> dict:
    """Make ghost-base, ghost-sft and ghost, a report, and return the figures of all stages."""
    start = time.perf_counter()
    display = Display()
    for stage, stage_settings in recipe(settings):
        stage.main(stage_settings, display)
        folder = ModelFolder(stage_settings.name)
        hardware.release_memory()
        # 4. Measure each on problems and text that no stage has seen (evals/).
        if not any(e["stage"] == f"{folder.card['stage']}-eval" for e in folder.events):
            evaluate(folder, settings.problems if folder.card["parent"] else -(-settings.problems // 4), display)
        hardware.release_memory()

    # 5. Tell what was made: report.html, report.md, and a short form here.
    if distributed.ranks()[0] == 0:
        page = write_report(folder)
        terminal_report(folder)
        display.say(f"\nreport: {page}\ntalk to it: nanoghost chat\n({(time.perf_counter() - start) / 60:.1f} minutes)")
    return {name: ModelFolder(name).card["figures"] for name in ("ghost-base", "ghost-sft", "ghost")}


def command(settings: SpeedrunSettings) -> None:
    figures = main(settings)
    if settings.json and distributed.ranks()[0] == 0:
        print(json.dumps(figures))
