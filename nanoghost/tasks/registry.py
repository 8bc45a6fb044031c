"""All tasks, in one ordered list. The order and the weights decide which problems SFT draws."""

import random
import re
from collections import Counter

from nanoghost.data.registry import open_data_source
from nanoghost.formats.model_card import ModelCard
from nanoghost.tasks.arithmetic import Sums
from nanoghost.tasks.base import Task, TaskContext
from nanoghost.tasks.creative import Creative
from nanoghost.tasks.everyday_sums import EverydaySums
from nanoghost.tasks.gym import ChainSum, SpellBackward, word_list
from nanoghost.tasks.identity import Identity, identity_facts
from nanoghost.tasks.letters import Letters
from nanoghost.tasks.plays import Plays
from nanoghost.tasks.recall import Recall
from nanoghost.tasks.refusal import Answerable, Refusal
from nanoghost.tasks.spelling import Counting, Spelling
from nanoghost.tasks.tool_use import Lookup, Programs

TASKS: tuple[type[Task], ...] = (
    Plays,
    Creative,
    Identity,
    Sums,
    EverydaySums,
    Spelling,
    Counting,
    Letters,
    Recall,
    Refusal,
    Answerable,
    ChainSum,
    SpellBackward,
    Programs,
    Lookup,
)
TASK_CLASSES = {task.name: task for task in TASKS}
RL_TASKS = [task.name for task in TASKS if task.rl]
DEFAULT_RL_TASKS = [task.name for task in TASKS if task.rl_default]


def build_tasks(context: TaskContext) -> dict[str, Task]:
    """The tasks that suit a model, by name, in the order of TASKS."""
    tasks: dict[str, Task] = {}
    for task_class in TASKS:
        task = task_class.build(context, tasks)
        if task is not None:
            tasks[task.name] = task
    return tasks


def all_tasks(base_card: ModelCard, name: str) -> dict[str, Task]:
    """The tasks of a model called `name` that descends from the base model with this card."""
    return build_tasks(context_of(base_card, name))


def evaluated_tasks(base_card: ModelCard, name: str) -> dict[str, Task]:
    """The tasks that `nanoghost eval` measures."""
    return {name: task for name, task in all_tasks(base_card, name).items() if task.evaluated}


def context_of(base_card: ModelCard, name: str) -> TaskContext:
    """Facts and words for the tasks. The card of an adopted model says nothing about its pretraining or its text."""
    card = {"name": chat_name(name), "parameters": base_card.parameters}
    texts: list[tuple[str, str]] = []
    pretrained_on_plays = False
    if base_card.stage != "adopt":
        data = base_card.settings["data"]
        pretrained_on_plays = data == "plays"
        texts = [(d.name, d.text) for d in open_data_source(data).documents() if d.split == "train"]
        card |= {
            "maker": "nanoghost",
            "tokens": base_card.figures["tokens"],
            "seconds": base_card.figures["seconds"],
            "machine": base_card.machine["cpu"],
            "data": base_card.data,
        }
    return TaskContext(identity_facts(card), spelling_words(texts), texts if pretrained_on_plays else [])


def chat_name(model_name: str) -> str:
    """What a model calls itself. An adapter, which often belongs to a person, has the name of its base."""
    return model_name.partition("@")[0].split("-")[0].capitalize()


def spelling_words(texts: list[tuple[str, str]], count: int = 3000) -> list[str]:
    """The `count` most frequent words of the texts, `count` words of the dictionary, and all long words."""
    counts = Counter(word for _, text in texts for word in re.findall(r"\b[a-z]{3,10}\b", text))
    frequent = [word for word, _ in counts.most_common(count)]
    long_words = sorted({word for _, text in texts for word in re.findall(r"\b[a-z]{11,20}\b", text)})
    return frequent + random.Random(0).sample(word_list(), count) + long_words
