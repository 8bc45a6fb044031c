"""Talk in the voice of the plays: someone speaks a line, the model speaks the next one."""

import random
import re
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, assistant, final_text, plain, split_of, user
from nanoghost.tasks.identity import INTENTS
from nanoghost.tasks.refusal import is_refusal

HEADING = re.compile(r"(?:ACT|Act|SCENE|Scene)\b[ .:IVXLC\d]*")
SMALL_WORDS = {"and", "of", "the", "to", "in", "with", "a"}
MAX_WORDS = 60
"""Of one speech."""
MAX_CONVERSATION_WORDS = 120


def speeches(text: str) -> list[list[tuple[str, str]]]:
    """Split a play into scenes, each a list of (speaker, speech) in order.

    A speech is a line with the speaker's name ("HAMLET.", "Ham.", "First Witch." or, without the stop, "PUCK"), the
    lines below it and an empty line. Stage directions in [brackets] go; all before the first scene goes too. Verse
    keeps its line ends, prose is joined.
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
        elif scenes and len(lines) > 1 and _is_speaker(lines[0]):
            scenes[-1].append((lines[0].rstrip(". "), _join(lines[1:])))
        elif scenes and scenes[-1] and not _is_speaker(lines[0]):
            speaker, speech = scenes[-1][-1]  # goes on after a stage direction
            scenes[-1][-1] = (speaker, speech + "\n" + _join(lines))
    return [scene for scene in scenes if scene]


def _is_speaker(line: str) -> bool:
    words = line.rstrip(".").split()
    if not 1 <= len(words) <= 4 or not re.fullmatch(r"[\w'’.,& -]+", line):
        return False
    capitals = all(word[0].isupper() or word[0].isdigit() or word in SMALL_WORDS for word in words)
    return line.isupper() or (line.endswith(".") and capitals)


def _join(lines: Sequence[str]) -> str:
    """A line that begins with a small letter goes on with a sentence of prose."""
    joined = lines[0]
    for line in lines[1:]:
        joined += (" " if line[0].islower() else "\n") + line
    return joined


def shorten(speech: str, words: int = MAX_WORDS) -> str | None:
    """Cut a speech after the last whole sentence within `words` words; None if its first sentence is longer."""
    if len(speech.split()) <= words:
        return speech
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s|--)", speech) if len(speech[: m.end()].split()) <= words]
    return speech[: ends[-1]] if ends else None


def looks_broken(text: str) -> bool:
    """Whether a text is no speech at all: empty, without letters, with marks of the chat, or going in circles."""
    words = re.findall(r"[a-z']+", text.lower())
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return not words or "<|" in text or "�" in text or len(fours) - len(set(fours)) > 2


class Plays:
    """Exchanges of the given works, each speech answered by the next one. 1 scene in 8 is kept for the test.

    `texts` holds (name, text) of the works to learn from; works kept for measuring must not be among them. There is no
    right answer to score: 1.0 is for any reply that isn't broken.
    """

    name = "plays"

    def __init__(self, texts: Sequence[tuple[str, str]], max_words: int = MAX_WORDS):
        runs: dict[str, list[list[str]]] = {"train": [], "test": []}
        for name, text in texts:
            for number, scene in enumerate(speeches(text)):
                runs[split_of(f"{name} {number}")] += _runs(scene, max_words)
        heard = {plain(speech) for run in runs["train"] for speech in run}  # "Ay, my lord." is in every play
        asked = {plain(question) for intent in INTENTS.values() for question in (*intent.train, *intent.test)}
        not_for = {"train": asked, "test": asked | heard}  # "Who are you?" is for the model, not for Bernardo
        self.exchanges = {
            split: [
                run[i : i + 6]
                for run in runs[split]
                for i in range(len(run) - 1)
                if plain(run[i]) not in not_for[split]
            ]
            for split in runs
        }
        """Every speech that has an answer, and the speeches after it: enough for three exchanges."""

    def problem(self, rng: random.Random, split: str) -> Problem:
        run = rng.choice(self.exchanges[split])
        turns = rng.choice((1, 1, 1, 1, 2, 3)) if split == "train" else 1
        turns = min(turns, len(run) // 2)
        while turns > 1 and sum(len(speech.split()) for speech in run[: 2 * turns]) > MAX_CONVERSATION_WORDS:
            turns -= 1
        messages = []
        for i, speech in enumerate(run[: 2 * turns]):
            # People type in one line; the model answers in verse where the play has verse.
            messages.append(assistant(speech) if i % 2 else user(speech.replace("\n", " ")))
        return Problem(self.name, tuple(messages[:-1]), (messages[-1],), run[2 * turns - 1])

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(not looks_broken(final_text(reply)))


def _runs(scene: Sequence[tuple[str, str]], max_words: int) -> list[list[str]]:
    """The longest runs of speeches that can be used, of two or more; a speech that can't be ends a run."""
    runs: list[list[str]] = [[]]
    for _, speech in scene:
        short = shorten(speech, max_words)
        if short is None or looks_broken(short) or is_refusal(short):
            runs.append([])
        else:
            runs[-1].append(short)
    return [run for run in runs if len(run) > 1]
