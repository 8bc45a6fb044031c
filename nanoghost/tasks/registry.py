"""Which tasks there are, and the mix of lessons that makes a chat model out of a base model."""

import random
import re
from collections import Counter
from collections.abc import Sequence

from nanoghost.data.conversations import load_conversations
from nanoghost.data.registry import open_source
from nanoghost.formats.model_card import ModelCard
from nanoghost.tasks.arithmetic import Sums
from nanoghost.tasks.base import Task, mixture
from nanoghost.tasks.gym import ChainSum, SpellBackward, word_list
from nanoghost.tasks.identity import Identity, identity_facts
from nanoghost.tasks.plays import Plays
from nanoghost.tasks.refusal import Answerable, Refusal
from nanoghost.tasks.spelling import Counting, Spelling
from nanoghost.tokenizer.chat_format import pieces

# How often each is drawn.
WEIGHTS = {
    "plays": 0.05,
    "identity": 0.135,
    "sums": 0.215,
    "spelling": 0.12,
    "counting": 0.135,
    "refusal": 0.13,
    "chain_sum": 0.205,
    "spell_backward": 0.01,
}
MIXES = {"lessons": WEIGHTS, "tools": WEIGHTS | {"programs": 0.2, "notes": 0.2}}
"""By the word for it in --data. The speedrun gives lessons; tools are those and lessons that call Python and look things up."""


def all_tasks(base_card: ModelCard, name: str) -> dict[str, Task]:
    """Every task by name, for a model called `name` that grew from the base model of that card.

    What others pretrained says nothing of how that was done, and is taught no text of ours.
    """
    from nanoghost.tasks.tool_use import Notes, Programs

    known, texts, data = {"name": spoken_name(name), "parameters": base_card.parameters}, [], None
    if base_card.stage != "adopt":
        figures, data = base_card.figures, base_card.settings["data"]
        known |= {"maker": "nanoghost", "tokens": figures["tokens"], "seconds": figures["seconds"],
                  "machine": base_card.machine["cpu"], "data": base_card.data}  # fmt: skip
        texts = [(d.name, d.text) for d in open_source(data).documents() if d.split == "train"]
    facts = identity_facts(known)
    words = spelled_words(texts)
    tasks = [Identity(facts), Sums(), Spelling(words), Counting(words), Refusal(), ChainSum(), SpellBackward()]
    if data == "plays":
        tasks.append(Plays(texts, max_words=40))
    answerable = [t for t in tasks if t.name not in ("refusal", "chain_sum", "spell_backward")]
    return {task.name: task for task in [*tasks, Answerable(answerable), Programs(words), Notes()]}


def spoken_name(name: str) -> str:
    """What a model of that name calls itself; an adapter, which is often a person's, speaks as its base."""
    return name.partition("@")[0].split("-")[0].capitalize()


def example_texts(count: int = 1000) -> list[str]:
    """What lessons are written in, for the tokenizer: calls and questions in few tokens make a fifth more lessons a minute."""
    words = word_list()
    tasks = (
        Identity(identity_facts({"maker": "nanoghost"})),
        Sums(),
        Spelling(words),
        Counting(words),
        Refusal(),
        ChainSum(),
        SpellBackward(),
    )
    texts = []
    for i in range(count):
        problem = tasks[i % len(tasks)].problem(random.Random(i), "train")
        texts += [text for text, is_mark, _ in pieces([*problem.messages, *problem.lesson]) if not is_mark]
    return texts


def spelled_words(texts: list[tuple[str, str]], count: int = 3000) -> list[str]:
    """The commonest words of the texts, and as many of the dictionary: what people type, and what they make up."""
    seen = Counter(word for _, text in texts for word in re.findall(r"\b[a-z]{3,10}\b", text))
    return [word for word, _ in seen.most_common(count)] + random.Random(0).sample(word_list(), count)


def own_conversations(data: str) -> list[list[dict]]:
    """Those of the file in `data`: a name of MIXES, FILE, or NAME+FILE."""
    mix, _, path = data.partition("+")
    path = path if mix in MIXES else data
    return load_conversations(path) if path else []


def lesson_conversations(
    data: str, base_card: ModelCard, name: str, count: int, seed: int, but: Sequence[str] = ()
) -> list[list[dict]]:
    """`count` conversations of a built-in mix, if `data` asks for one; conversation i depends on (seed, i) alone.

    `but` names tasks that are left out.
    """
    if (mix := data.partition("+")[0]) not in MIXES:
        return []
    tasks = all_tasks(base_card, name)
    weighted = [(tasks[task], weight) for task, weight in MIXES[mix].items() if task in tasks and task not in but]
    return [mixture(weighted, random.Random(f"{seed}-{i}"), "train", spoken_name(name)) for i in range(count)]
