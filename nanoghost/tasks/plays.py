"""Dialogue in the style of the plays: the user speaks a line, the model speaks the next one."""

import random
import re
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, Task, TaskContext, split_of
from nanoghost.tasks.identity import INTENTS
from nanoghost.tasks.messages import assistant, final_text, user
from nanoghost.tasks.refusal import is_refusal
from nanoghost.tasks.wording import normalize

HEADING = re.compile(r"(?:ACT|Act|SCENE|Scene)\b[ .:IVXLC\d]*")
SMALL_WORDS = {"and", "of", "the", "to", "in", "with", "a"}
MAX_WORDS = 60
"""Longest speech."""
MAX_CONVERSATION_WORDS = 120
MAX_SPEECHES = 6
"""Longest conversation: three exchanges."""


# ── from the text of a play to speeches ──────────────────────────────────────────────────────────────────────────────


def split_into_scenes(text: str) -> list[list[tuple[str, str]]]:
    """Split a play into scenes, each a list of (speaker, speech) in order.

    A speech is a line with the speaker's name ("HAMLET.", "Ham.", "First Witch." or, without the stop, "PUCK"), the
    lines below it and an empty line. Stage directions in [brackets] and everything before the first scene are removed.
    Verse keeps its line ends, prose is joined.
    """
    text = text.replace("\r\n", "\n").replace("_", "")
    text = re.sub(r"[\[{][^\[\]{}]{0,400}[\]}]", "", text)
    scenes: list[list[tuple[str, str]]] = []
    for block in re.split(r"\n[ \t]*\n", text):
        lines = [re.sub(r"\s+", " ", line).strip() for line in block.strip().split("\n")]
        lines = [line for line in lines if line and line != "."]
        if not lines:
            continue
        if HEADING.match(lines[0]):
            scenes.append([])
        elif scenes and len(lines) > 1 and is_speaker(lines[0]):
            scenes[-1].append((lines[0].rstrip(". "), join_lines(lines[1:])))
        elif scenes and scenes[-1] and not is_speaker(lines[0]):  # the speech continues after a stage direction
            speaker, speech = scenes[-1][-1]
            scenes[-1][-1] = (speaker, speech + "\n" + join_lines(lines))
    return [scene for scene in scenes if scene]


def is_speaker(line: str) -> bool:
    words = line.rstrip(".").split()
    if not 1 <= len(words) <= 4 or not re.fullmatch(r"[\w'’.,& -]+", line):
        return False
    capitals = all(word[0].isupper() or word[0].isdigit() or word in SMALL_WORDS for word in words)
    return line.isupper() or (line.endswith(".") and capitals)


def join_lines(lines: Sequence[str]) -> str:
    """Verse or prose: a line that begins with a small letter continues a sentence of prose."""
    text = lines[0]
    for line in lines[1:]:
        text += (" " if line[0].islower() else "\n") + line
    return text


def shorten(speech: str, words: int = MAX_WORDS) -> str | None:
    """Cut a speech after the last whole sentence within `words` words; None if its first sentence is longer."""
    if len(speech.split()) <= words:
        return speech
    shortened = None
    for match in re.finditer(r"[.!?](?=\s|--)", speech):
        if len(speech[: match.end()].split()) <= words:
            shortened = speech[: match.end()]
    return shortened


def looks_broken(text: str) -> bool:
    """Whether a text cannot be a speech: it has no letters, contains special tokens, or repeats itself."""
    words = re.findall(r"[a-z']+", text.lower())
    four_grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    repeats = len(four_grams) - len(set(four_grams))
    return not words or "<|" in text or "�" in text or repeats > 2


def usable_runs(scene: Sequence[tuple[str, str]], max_words: int) -> list[list[str]]:
    """The longest runs of at least two consecutive usable speeches; an unusable speech ends a run."""
    runs: list[list[str]] = [[]]
    for _, speech in scene:
        short = shorten(speech, max_words)
        if short is None or looks_broken(short) or is_refusal(short):
            runs.append([])
        else:
            runs[-1].append(short)
    return [run for run in runs if len(run) > 1]


# ── the task ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Plays(Task):
    """Exchanges of the given works: each speech is answered by the next one. 1 scene in 8 is held out.

    `texts` are the (name, text) of the training works; held-out works must not be among them. There is no correct
    answer: every reply that is not broken scores 1.0.
    """

    name = "plays"
    label = "plays"
    weight = 0.03
    evaluated = False
    rl = False

    def __init__(self, texts: Sequence[tuple[str, str]], max_words: int = MAX_WORDS):
        runs: dict[str, list[list[str]]] = {"train": [], "test": []}
        for name, text in texts:
            for number, scene in enumerate(split_into_scenes(text)):
                runs[split_of(f"{name} {number}")] += usable_runs(scene, max_words)
        # "Ay, my lord." is in every play: a held-out question must not be a training question
        train_speeches = {normalize(speech) for run in runs["train"] for speech in run}
        identity_questions = set()  # "Who are you?" asks the model, not Bernardo
        for intent in INTENTS.values():
            identity_questions |= {normalize(question) for question in (*intent.train, *intent.test)}
        excluded = {"train": identity_questions, "test": identity_questions | train_speeches}
        self.exchanges = {split: speeches_with_answer(runs[split], excluded[split]) for split in runs}
        """By split: each speech that has an answer, followed by the next speeches."""

    @classmethod
    def build(cls, context: TaskContext, earlier_tasks: dict[str, Task]) -> Task | None:
        return cls(context.plays, max_words=40) if context.plays else None

    def problem(self, rng: random.Random, split: str) -> Problem:
        run = rng.choice(self.exchanges[split])
        turns = rng.choice((1, 1, 1, 1, 2, 3)) if split == "train" else 1
        turns = min(turns, len(run) // 2)
        while turns > 1 and sum(len(speech.split()) for speech in run[: 2 * turns]) > MAX_CONVERSATION_WORDS:
            turns -= 1
        messages = []
        for i, speech in enumerate(run[: 2 * turns]):
            # Users type in one line; the model answers in verse where the play has verse.
            messages.append(assistant(speech) if i % 2 else user(speech.replace("\n", " ")))
        return Problem(self.name, tuple(messages[:-1]), (messages[-1],), run[2 * turns - 1])

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(not looks_broken(final_text(reply)))


def speeches_with_answer(runs: list[list[str]], excluded: set[str]) -> list[list[str]]:
    exchanges = []
    for run in runs:
        for i in range(len(run) - 1):
            if normalize(run[i]) not in excluded:
                exchanges.append(run[i : i + MAX_SPEECHES])
    return exchanges
