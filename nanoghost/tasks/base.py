"""What a task is: problems drawn at random, a lesson that shows a good answer, a score for any answer.

Train and test never meet. Phrasings are written down in phrases/*.toml, in lists called train and test; contents (the
numbers, the word) are dealt by a stable hash, 1 in 8 to test, whatever the task: a word that is tested backwards is
never spelled forwards in a lesson.
"""

import random
import re
import tomllib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Problem:
    task: str
    messages: tuple[dict, ...]
    """OpenAI messages up to and including the user's question."""
    lesson: tuple[dict, ...]
    """The assistant (and tool) messages that answer it well."""
    answer: str
    """What `score` compares with."""
    tools: tuple[str, ...] = ("calculator",)
    """Names of the tools that may be called."""


class Task(Protocol):
    name: str

    def problem(self, rng: random.Random, split: str) -> Problem:
        """Draw a problem of the split "train" or "test"."""
        ...

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        """1.0 or 0.0 for the messages a model produced: assistant, tool, assistant ..."""
        ...


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(content: str | list[dict]) -> dict:
    return {"role": "assistant", "content": content}


def parts(pieces: Sequence[str]) -> list[dict]:
    """OpenAI text parts. Each is tokenised on its own, so a token never crosses from one to the next."""
    return [{"type": "text", "text": piece} for piece in pieces]


def text_of(message: dict) -> str:
    """The text of a message, whether it is written as a string or in parts."""
    content = message["content"]
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""  # OpenAI allows null beside tool calls


def final_text(reply: Sequence[dict]) -> str:
    """What the model said last; empty if the reply doesn't end with an assistant message."""
    return text_of(reply[-1]).strip() if reply and reply[-1]["role"] == "assistant" else ""


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands commas; None if there is none."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", text.replace("−", "-"))
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", plain)
    return numbers[-1] if numbers else None


# ── splits and wording ──────────────────────────────────────────────────────────────────────────────────────


def split_of(content: str) -> str:
    """The split a content belongs to, for ever and on every machine: 1 in 8 is test."""
    return "test" if zlib.crc32(content.lower().encode()) % 8 == 0 else "train"


@cache
def phrases(name: str) -> dict:
    """The content of phrases/`name`.toml in its order, with tuples for lists, since all callers share it."""

    def fixed(value):
        if isinstance(value, dict):
            return {key: fixed(inner) for key, inner in value.items()}
        return tuple(value) if isinstance(value, list) else value

    path = Path(__file__).with_name("phrases") / f"{name}.toml"
    return fixed(tomllib.loads(path.read_text(encoding="utf-8")))


OPENERS = ("Please: ", "Tell me: ", "A question: ", "Hello. ", "Hi! ", "Good day. ", "One more thing: ")


def wording(rng: random.Random, templates: Sequence[str], split: str) -> str:
    """Choose a template and sometimes type it the way people do: all lower case, no final mark, a word before it.

    Works on the template, before the slots are filled: the content stays as it is.
    """
    template = rng.choice(templates)
    if split == "train" and template.endswith("?") and rng.random() < 0.08:
        template = rng.choice(OPENERS) + template
    if rng.random() < 0.12:
        template = template.lower()
    if rng.random() < 0.12:
        template = template.rstrip("?.!")
    return template


WORD = r"(?<![{\w'])[A-Za-z']+(?![}\w'])"  # of a template; never a slot


@cache
def common_words() -> tuple[str, ...]:
    """The words of all phrasings that lessons use, whatever the task."""

    def texts(value, key=""):
        if isinstance(value, str):
            return [value]
        inner = value.items() if isinstance(value, dict) else ((key, v) for v in value)
        return [text for key, v in inner if key != "test" for text in texts(v, key)]

    names = ("identity", "refusal", "spelling", "sums")
    return tuple(sorted({word.lower() for name in names for t in texts(phrases(name)) for word in re.findall(WORD, t)}))


def estranged(rng: random.Random, template: str, share: float) -> str:
    """The template with a share of its words replaced, by any others or by unknown ones.

    A person's phrasing may hold any word: where the slots tell what is wanted, no other word should matter.
    """

    def other(match: re.Match) -> str:
        if rng.random() >= share:
            return match[0]
        made_up = "".join(
            rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") + rng.choice(("", "n", "r", "ck")) for _ in range(2)
        )
        word = rng.choice((made_up, rng.choice(common_words())))
        return word.capitalize() if match[0][0].isupper() else word

    return re.sub(WORD, other, template)


def plain(text: str) -> str:
    """A text without case and punctuation: two phrasings that differ only there are the same."""
    return " ".join(re.findall(r"[a-z0-9{}]+", text.lower().replace("'", "")))


def distinct_problems(task: Task, count: int, seed: int = 0, split: str = "test") -> list[Problem]:
    """The first `count` problems of a seed that ask different questions: a fixed examination. Fewer if there are no more."""
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    for _ in range(100 * count + 1000):
        if len(found) == count:
            break
        problem = task.problem(rng, split)
        found.setdefault("\n".join(text_of(message) for message in problem.messages), problem)
    return list(found.values())


# ── lessons ─────────────────────────────────────────────────────────────────────────────────────────────────

SYSTEMS = (
    "You are {name}, a helpful assistant.",
    "You are {name}.",
    "You are {name}, a small language model.",
    "You are a helpful assistant.",
    "Answer briefly and honestly.",
    "You are {name}. If you don't know, say so.",
)


def mixture(
    tasks_with_weights: Sequence[tuple[Task, float]], rng: random.Random, split: str = "train", name: str = "Ghost"
) -> list[dict]:
    """One conversation to learn from: now and then a system message, and mostly one problem, sometimes two or three.

    The problems of one conversation come from different tasks, so that the model learns to change the subject.
    """
    remaining = list(tasks_with_weights)
    turns = min(rng.choice((2, 2, 3)) if rng.random() < 0.15 else 1, len(remaining))
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS).format(name=name)})
    for _ in range(turns):
        [chosen] = rng.choices(range(len(remaining)), weights=[weight for _, weight in remaining])
        task, _ = remaining.pop(chosen)
        problem = task.problem(rng, split)
        messages += [*problem.messages, *problem.lesson]
    return messages
