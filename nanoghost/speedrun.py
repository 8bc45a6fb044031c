"""The whole pipeline in one readable file. START READING HERE.

    an empty folder -> text -> tokenizer -> pretraining -> SFT -> RL -> evaluation -> report -> chat

Each stage writes its own model folder. Stop it at any moment: the same command resumes where it was.
Read on in train/pretrain.py, train/sft.py and train/rl.py (one visible training loop each), then model/ghost.py.
"""

import json
import math
import time
from dataclasses import dataclass

from nanoghost import distributed, hardware
from nanoghost.evals.evaluate import evaluate
from nanoghost.evals.report import print_report, write_report
from nanoghost.home import ModelFolder
from nanoghost.progress import Display, JsonFlag
from nanoghost.train import pretrain, rl, sft

BASE, SFT, FINAL = "ghost-base", "ghost-sft", "ghost"  # names of the models of pretraining, SFT and RL


@dataclass(frozen=True)
class SpeedrunSettings(JsonFlag):
    minutes: float = 9.5
    """Minutes of training in total: 17% pretraining, 59% SFT, 24% RL."""
    data: str = "plays"
    """Training text: plays, a file or folder, or hub:OWNER/NAME."""
    problems: int = 200
    """Held-out problems of each skill in the evaluation (a tenth of them for the base model)."""
    seed: int = 0
    """Random seed."""
    force: bool = False
    """Start again, replacing ghost-base, ghost-sft and ghost."""


def main(settings: SpeedrunSettings) -> dict:
    """Train the three models and write a report; returns the figures of all stages."""
    start = time.perf_counter()
    display = Display()
    pretrain_settings, sft_settings, rl_settings = stage_settings(settings)

    # 1. Pretraining: learn to continue text. This also trains the tokenizer (data/, tokenizer/, train/pretrain.py).
    pretrain.main(pretrain_settings, display)
    evaluate_once(BASE, math.ceil(settings.problems / 10), display)

    # 2. SFT: learn to answer, from conversations with sums, spelling, and questions to refuse (tasks/, train/sft.py).
    sft.main(sft_settings, display)
    evaluate_once(SFT, settings.problems, display)

    # 3. RL: several rollouts of each problem, whose answers can be checked (train/rl.py).
    rl.main(rl_settings, display)

    # 4. Evaluation, as after the other stages: text and problems that no stage has seen (evals/).
    evaluate_once(FINAL, settings.problems, display)

    # 5. Report: report.html and report.md in the model folder, and a short form here (evals/report.py).
    if distributed.is_main_process():
        page = write_report(ModelFolder(FINAL))
        print_report(ModelFolder(FINAL))
        minutes = (time.perf_counter() - start) / 60
        display.print(f"\nreport: {page}\nchat with the model: nanoghost chat\n({minutes:.1f} minutes)")
    return {name: ModelFolder(name).card.figures for name in (BASE, SFT, FINAL)}


def stage_settings(settings: SpeedrunSettings) -> tuple[pretrain.PretrainSettings, sft.SftSettings, rl.RlSettings]:
    """How the speedrun divides its minutes between the stages."""
    minutes, seed, force = settings.minutes, settings.seed, settings.force
    return (
        pretrain.PretrainSettings(
            name=BASE, data=settings.data, minutes=0.17 * minutes, dial_minutes=minutes, seed=seed, force=force
        ),
        sft.SftSettings(parent=BASE, name=SFT, minutes=0.59 * minutes, seed=seed, force=force),
        rl.RlSettings(parent=SFT, name=FINAL, minutes=0.24 * minutes, seed=seed, force=force),
    )


def evaluate_once(name: str, problems: int, display: Display) -> None:
    """Evaluate a model, unless an earlier run of the same command has done so."""
    hardware.release_memory()  # of the stage that has just ended
    folder = ModelFolder(name)
    if not any(event["stage"] == f"{folder.card.stage}-eval" for event in folder.events):
        evaluate(folder, problems, display)
        hardware.release_memory()


def command(settings: SpeedrunSettings) -> None:
    figures = main(settings)
    if settings.json and distributed.is_main_process():
        print(json.dumps(figures))
