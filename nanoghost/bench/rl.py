"""`nanoghost bench rl`: steps of reinforcement, attempts and update together, beside TRL on the same problems.

Both train the whole model in bf16 and sample at temperature 1. The verifier tosses a coin by the words of an attempt: every
group of attempts then has something to learn from, whatever the model knows. (Where all attempts at a problem earn the same,
we leave them out of the update; that would be to our favour.)
"""

import importlib
import tempfile
import time
import zlib
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanoghost import hardware
from nanoghost.bench.table import limits, peers, tell
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, open_model
from nanoghost.optim.optimizer import Optimizer
from nanoghost.tasks.registry import all_tasks
from nanoghost.train import rl
from nanoghost.train.hyperparameters import finetune_groups
from nanoghost.train.rollouts import accumulate_policy_gradients, compute_advantages, problems_of_step, sample_rollouts


@dataclass(frozen=True)
class RlBenchSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    task: str = "chain_sum"
    """What is practised."""
    problems: int = 16
    """Problems in a step."""
    attempts: int = 8
    """Attempts at each problem."""
    max_tokens: int = 32
    """Longest attempt."""
    rounds: int = 3
    """Times that a step of each is measured, after one to warm up."""
    against: str = ""
    """trl: its GRPOTrainer, with transformers' generation, measured in turn with us."""
    json: bool = False
    """Print the figures as JSON on standard output."""


class Tossed:
    """A task's problems, with a coin for a verifier."""

    def __init__(self, task):
        self.problem = task.problem

    def score(self, problem, reply) -> float:
        return float(zlib.crc32(str(reply[-1]["content"]).encode()) % 2)


class Ours:
    def __init__(self, folder: ModelFolder, settings: RlBenchSettings, task):
        self.model, self.tokenizer = load_model(folder.path, hardware.compute_dtype())
        self.tasks, self.at = {settings.task: task}, 0
        self.settings = rl.RlSettings(
            tasks=settings.task, problems=settings.problems, rollouts=settings.attempts, max_tokens=settings.max_tokens
        )
        rates = finetune_groups(folder.card.root, self.model.config.width, 1.0)
        self.optimizer = Optimizer(self.model, rates, hardware.compute_dtype(), 0, 1)

    def step(self) -> float:
        """Attempts a minute."""
        start = time.perf_counter()
        rollouts = sample_rollouts(self.model, self.tokenizer, self.tasks, self.settings, self.at)
        advantages_N, denominators_N = compute_advantages(rollouts, self.settings)
        accumulate_policy_gradients(self.model, rollouts.sequences, advantages_N, denominators_N, self.settings)
        self.optimizer.step(1e-3)  # so small that the next step finds the same model
        self.at += 1
        return self.settings.problems * self.settings.attempts / (time.perf_counter() - start) * 60


class Trl:
    def __init__(self, folder: ModelFolder, settings: RlBenchSettings, task):
        trl, transformers = importlib.import_module("trl"), importlib.import_module("transformers")
        datasets = importlib.import_module("datasets")
        mine = rl.RlSettings(tasks=settings.task, problems=settings.problems)
        problems = {}
        for step in range(2 * settings.rounds + 2):
            for problem in problems_of_step({settings.task: task}, mine, step, 0, 1):
                problems.setdefault(problem.messages[-1]["content"], problem)

        def reward(prompts, completions, **_):
            return [task.score(problems[p[-1]["content"]], c) for p, c in zip(prompts, completions)]

        self.attempts, self.times = settings.problems * settings.attempts, []

        class Watch(transformers.TrainerCallback):
            def on_step_begin(callback, *_, **__):
                callback.start = time.perf_counter()

            def on_step_end(callback, *_, **__):
                self.times.append(time.perf_counter() - callback.start)

        self.folder = tempfile.TemporaryDirectory()
        arguments = trl.GRPOConfig(
            output_dir=self.folder.name, use_cpu=True, bf16=True, report_to="none", save_strategy="no", disable_tqdm=True,
            max_steps=1, learning_rate=1e-8, per_device_train_batch_size=self.attempts, num_generations=settings.attempts,
            max_completion_length=settings.max_tokens, temperature=1.0, loss_type="cispo", gradient_checkpointing=False,
            model_init_kwargs={"dtype": "bfloat16"},
        )  # fmt: skip
        self.trainer = trl.GRPOTrainer(
            model=str(folder.path), reward_funcs=reward, args=arguments, callbacks=[Watch()],
            train_dataset=datasets.Dataset.from_list([{"prompt": list(p.messages)} for p in problems.values()]),
        )  # fmt: skip

    def step(self) -> float:
        """Attempts a minute."""
        self.trainer.train()
        return self.attempts / self.times[-1] * 60


def command(settings: RlBenchSettings) -> None:
    hardware.prepare()
    folder = open_model(settings.model)
    if settings.rounds < 1:
        raise UserError("--rounds is at least 1")
    asked = rl.RlSettings(tasks=settings.task, problems=settings.problems, rollouts=settings.attempts)
    rl.check(asked, 1)
    task = Tossed(all_tasks(folder.card.root, folder.name)[settings.task])
    rivals = {"nanoghost": Ours(folder, settings, task)}
    if peers(settings.against, folder, ["trl"]):
        rivals["TRL"] = Trl(folder, settings, task)
    works = [(name, "rl", settings.problems * settings.attempts, rival.step) for name, rival in rivals.items()]
    tell(settings, limits(), works, None, "attempts/min")
