"""What a task is: it draws problems at random, shows a good answer to each (SFT trains on it), and scores any answer.

To add a task, write one file with a subclass of `Task`, and add the class to TASKS in registry.py. Everything else
asks the registry: the SFT mixes, RL, evaluation and the report.

Train and test problems are disjoint. Each phrasing is in the train or in the test list of phrases/*.toml, and contents
(the numbers, the word) are split by a hash that is the same for all tasks: a word that is tested backwards is never
spelled in an SFT example.
"""

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from nanoghost.tokenizer.chat_format import text_of

MIXES = ("builtin", "tools")
"""The built-in mixes of SFT conversations, values of --data. All of them teach to call tools."""


@dataclass(frozen=True)
class Problem:
    task: str
    """Name of the task."""
    messages: tuple[dict, ...]
    """OpenAI messages up to and including the user's question."""
    solution: tuple[dict, ...]
    """Assistant (and tool) messages of a good answer."""
    answer: str
    """What `score` compares with."""
    tools: tuple[str, ...] = ("calculator",)
    """Names of the tools that the model may call."""


@dataclass(frozen=True)
class TaskContext:
    """What the tasks of a model depend on."""

    facts: dict[str, str]
    """What the model may say about itself."""
    words: list[str]
    """Words to spell."""
    plays: list[tuple[str, str]] = field(default_factory=list)
    """(name, text) of the training works, if the base model was pretrained on the plays."""


class Task(ABC):
    name: ClassVar[str]
    label: ClassVar[str]
    """Row in the report."""
    weight: ClassVar[float] = 0.0
    """How often SFT draws the task, relative to the other tasks of a mix (0 = never)."""
    mixes: ClassVar[tuple[str, ...]] = MIXES
    """The SFT mixes (values of --data) that contain the task."""
    evaluated: ClassVar[bool] = True
    """Whether `nanoghost eval` measures the task."""
    rl: ClassVar[bool] = True
    """Whether RL can train on the task."""
    rl_default: ClassVar[bool] = False
    """Whether RL trains on the task by default."""
    needs_sandbox: ClassVar[bool] = False
    """Whether answers call Python, which must be installed with its sandbox."""

    @classmethod
    def build(cls, context: TaskContext, earlier_tasks: dict[str, "Task"]) -> "Task | None":
        """The task for a model, None if it does not suit the model. `earlier_tasks` precede it in the registry."""
        return cls()

    @abstractmethod
    def problem(self, rng: random.Random, split: str) -> Problem:
        """Draw a problem of the split "train" or "test"."""

    @abstractmethod
    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        """1.0 or 0.0 for the messages that a model produced: assistant, tool, assistant ..."""


def split_of(content: str) -> str:
    """The split of a problem with this content, the same on every machine. 1 content in 8 is for tests."""
    return "test" if zlib.crc32(content.lower().encode()) % 8 == 0 else "train"


def distinct_problems(task: Task, count: int, seed: int = 0, split: str = "test") -> list[Problem]:
    """The first `count` problems of a seed with different questions (fewer if there are no more): an evaluation set."""
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    for _ in range(100 * count + 1000):
        if len(problems) == count:
            break
        problem = task.problem(rng, split)
        question = "\n".join(text_of(message) for message in problem.messages)
        problems.setdefault(question, problem)
    return list(problems.values())
