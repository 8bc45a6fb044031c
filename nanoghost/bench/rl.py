"""`nanoghost bench rl`: speed of RL steps (rollouts and update), compared with TRL on the same problems.

Both train the whole model in bf16 and sample at temperature 1. The reward is a coin toss (a hash of the reply), so the
rewards of a problem's rollouts differ whatever the model can do. nanoghost leaves a problem with equal rewards out of
the update, which would favor it.
"""

import tempfile
import time
import zlib
from dataclasses import dataclass

from nanoghost import hardware
from nanoghost.bench.harness import Workload, measure_and_report, measure_limits, requested_baselines
from nanoghost.commands.arguments import ModelArgument
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, open_model
from nanoghost.optim.optimizer import Optimizer
from nanoghost.progress import JsonFlag
from nanoghost.tasks.base import Problem
from nanoghost.tasks.registry import all_tasks
from nanoghost.train import rl
from nanoghost.train.hyperparameters import finetune_groups
from nanoghost.train.rollouts import accumulate_policy_gradients, compute_advantages, problems_of_step, sample_rollouts


@dataclass(frozen=True)
class RlBenchSettings(ModelArgument, JsonFlag):
    task: str = "chain_sum"
    """Task to train on."""
    problems: int = 16
    """Problems in a step."""
    rollouts: int = 8
    """Rollouts of each problem."""
    max_tokens: int = 32
    """Maximum number of tokens in a rollout."""
    rounds: int = 3
    """Number of measurements: one step each, after a step to warm up."""
    against: str = ""
    """Baseline: trl (its GRPOTrainer, which generates with transformers). It must be installed."""


class CoinTossTask:
    """The problems of another task, with random rewards."""

    def __init__(self, task):
        self.problem = task.problem

    def score(self, problem, reply) -> float:
        return float(zlib.crc32(str(reply[-1]["content"]).encode()) % 2)


class NanoghostRl:
    """RL training with nanoghost."""

    def __init__(self, folder: ModelFolder, settings: RlBenchSettings, task: CoinTossTask):
        self.model, self.tokenizer = load_model(folder.path, hardware.compute_dtype())
        self.tasks = {settings.task: task}
        self.next_step = 0
        self.settings = rl.RlSettings(
            tasks=settings.task,
            problems=settings.problems,
            rollouts=settings.rollouts,
            max_tokens=settings.max_tokens,
        )
        groups = finetune_groups(folder.card.root, self.model.config.width, 1.0)
        self.optimizer = Optimizer(self.model, groups, hardware.compute_dtype())

    def step(self) -> float:
        """Rollouts per minute."""
        start = time.perf_counter()
        rollouts = sample_rollouts(self.model, self.tokenizer, self.tasks, self.settings, self.next_step)
        advantages_N, denominators_N = compute_advantages(rollouts, self.settings)
        accumulate_policy_gradients(self.model, rollouts.sequences, advantages_N, denominators_N, self.settings)
        self.optimizer.step(1e-3)  # so small that the next step has practically the same model
        self.next_step += 1
        return 60 * self.settings.problems * self.settings.rollouts / (time.perf_counter() - start)


def problems_by_text(settings: RlBenchSettings, task: CoinTossTask) -> dict[str, Problem]:
    """More problems than the steps of all rounds need, by the text of their last message."""
    problem_settings = rl.RlSettings(tasks=settings.task, problems=settings.problems)
    problems = {}
    for step in range(2 * settings.rounds + 2):
        for problem in problems_of_step({settings.task: task}, problem_settings, step, rank=0, world_size=1):
            problems.setdefault(problem.messages[-1]["content"], problem)
    return problems


class TrlBaseline:
    """RL training with TRL's GRPOTrainer."""

    def __init__(self, folder: ModelFolder, settings: RlBenchSettings, task: CoinTossTask):
        import datasets
        import trl
        from transformers import TrainerCallback

        problems = problems_by_text(settings, task)
        self.rollouts = settings.problems * settings.rollouts
        self.step_seconds: list[float] = []

        def reward(prompts, completions, **_) -> list[float]:
            rewards = []
            for prompt, completion in zip(prompts, completions):
                problem = problems[prompt[-1]["content"]]
                rewards.append(task.score(problem, completion))
            return rewards

        step_seconds = self.step_seconds

        class StepTimer(TrainerCallback):
            def on_step_begin(self, *_, **__):
                self.start = time.perf_counter()

            def on_step_end(self, *_, **__):
                step_seconds.append(time.perf_counter() - self.start)

        self.folder = tempfile.TemporaryDirectory()
        arguments = trl.GRPOConfig(
            output_dir=self.folder.name,
            use_cpu=True,
            bf16=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_steps=1,
            learning_rate=1e-8,
            per_device_train_batch_size=self.rollouts,
            num_generations=settings.rollouts,
            max_completion_length=settings.max_tokens,
            temperature=1.0,
            loss_type="cispo",
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "bfloat16"},
        )
        prompts = [{"prompt": list(problem.messages)} for problem in problems.values()]
        self.trainer = trl.GRPOTrainer(
            model=str(folder.path),
            reward_funcs=reward,
            args=arguments,
            callbacks=[StepTimer()],
            train_dataset=datasets.Dataset.from_list(prompts),
        )

    def step(self) -> float:
        """Rollouts per minute."""
        self.trainer.train()
        return 60 * self.rollouts / self.step_seconds[-1]


def command(settings: RlBenchSettings) -> None:
    hardware.prepare()
    folder = open_model(settings.model)
    if settings.rounds < 1:
        raise UserError("--rounds must be at least 1")
    rl.check_rl_settings(rl.RlSettings(tasks=settings.task, problems=settings.problems, rollouts=settings.rollouts), 1)
    task = CoinTossTask(all_tasks(folder.card.root, folder.name)[settings.task])
    systems = {"nanoghost": NanoghostRl(folder, settings, task)}
    if requested_baselines(settings.against, folder, ["trl"]):
        systems["TRL"] = TrlBaseline(folder, settings, task)
    rollouts = settings.problems * settings.rollouts
    workloads = [Workload(name, "rl", rollouts, system.step) for name, system in systems.items()]
    measure_and_report(workloads, settings.rounds, settings.json, measure_limits(), "rollouts/min")
