"""Lines in the voice of the plays: a verse, a story, an insult, a joke, the continuation of a line, a character.

Continuations are those of the training works. The rest is put together from phrases/creative.toml: what a small model
makes up freely in greedy decoding, it repeats.
"""

import random
import re
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, Task, TaskContext, split_of
from nanoghost.tasks.messages import assistant, final_text, user
from nanoghost.tasks.plays import looks_broken, shorten, split_into_scenes
from nanoghost.tasks.refusal import capitalize_first, is_refusal
from nanoghost.tasks.wording import draw_line, families, load_phrases, made_up_word

PIECES = load_phrases("creative")
KINDS = {
    "story": 3,
    "poem": 3,
    "poem_about": 4,
    "insult_me": 2,
    "joke": 2,
    "verse_line": 2,
    "continue": 10,
    "character": 4,
    "pirate": 1,
    "battle": 1,
    "love_letter": 1,
}
"""Lists of lines in phrases/people, and how often each is drawn."""
VERSE_LINES = 4
"""Shortest speech that is a verse; a continuation has at most three lines."""


class Creative(Task):
    """write me a poem about the sea. Correct: some lines, no refusal."""

    name = "creative"
    label = "lines in the voice of the plays"
    weight = 0.09
    rl = False

    def __init__(self, texts: Sequence[tuple[str, str]]):
        speeches: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        for work, text in texts:
            for number, scene in enumerate(split_into_scenes(text)):
                speeches[split_of(f"{work} {number}")] += scene  # as in plays.py
        self.speeches = {split: [] for split in speeches}
        self.verses = {split: [] for split in speeches}
        for split, pairs in speeches.items():
            for speaker, speech in pairs:
                short = shorten(speech, 45)
                if short and len(short.split()) >= 5 and usable(short):
                    self.speeches[split].append((speaker.upper(), short))
                lines = speech.split("\n")
                if len(lines) >= VERSE_LINES and all(20 < len(line) < 70 for line in lines[:-1]) and usable(speech):
                    self.verses[split].append(lines)

    @classmethod
    def build(cls, context: TaskContext, earlier_tasks: dict[str, Task]) -> Task | None:
        return cls(context.plays) if context.plays else None

    def problem(self, rng: random.Random, split: str) -> Problem:
        [kind] = rng.choices(tuple(KINDS), weights=tuple(KINDS.values()))
        line = draw_line(rng, families("creative", kind, split), split)
        question, answer = getattr(self, kind.replace("continue", "continuation"))(rng, split, line)
        return Problem(self.name, (user(question),), (assistant(answer),), "")

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        text = final_text(reply)
        return float(len(text.split()) >= 4 and not looks_broken(text) and not is_refusal(text))

    # ── one method for each kind: (question, answer) ──────────────────────────────────────────────────────────────────

    def story(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        story = PIECES["story"]
        scary = re.search(r"scar|ghost|spook|horror|creep|dark|haunt|fright", line, re.I)
        slots = {slot: rng.choice(story[slot]) for slot in ("who", "other", "place", "thing", "time")}
        parts = ("begin", "middle", "scary" if scary else "turn", "end")
        text = " ".join(rng.choice(story[part]).format(**slots) for part in parts)
        return line, re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def poem(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        return line, ode(rng, rng.choice(("love", "night", "moon", "sea")))

    def poem_about(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        topics = PIECES["ode"]
        topic = rng.choice((rng.choice(topics["others"]), rng.choice(topics["topics"]), made_up_word(rng)))
        article = rng.choice(("", "the ", "the ", "my ")) if " " not in topic else ""
        return line.replace("{topic}", article + topic), ode(rng, re.sub("^(my|the|an?) ", "", topic))

    def insult_me(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        return line, insult(rng)

    def joke(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        return line, rng.choice(PIECES["joke"]["jokes"])

    def verse_line(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        return line, speech(rng)

    def continuation(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        """The beginning of a verse, up to the end of a line or within it; the answer goes on."""
        lines = rng.choice(self.verses[split])
        start = rng.randrange(len(lines) - VERSE_LINES + 1)
        words = lines[start].split()
        cut = len(words) if rng.random() < 0.5 else rng.randint(3, len(words))
        beginning, rest = " ".join(words[:cut]), " ".join(words[cut:])
        if rng.random() < 0.4:
            beginning = beginning.lower().rstrip(".,;:!?")
        answer = [rest] * bool(rest) + lines[start + 1 : start + VERSE_LINES - 1]
        if rng.random() < 0.2:  # a speaker's name before the line, and nothing else
            speaker, _ = rng.choice(self.speeches[split])
            return f"{speaker}:\n{beginning}", "\n".join(answer)
        question = beginning if rng.random() < 0.3 else line.replace("{line}", beginning)
        return question, "\n".join(answer)

    def character(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        who = rng.choice(PIECES["character"]["who"])
        if rng.random() < 0.4:
            who, _ = rng.choice(self.speeches[split])
            who = rng.choice((who.title(), who.lower()))
        return line.replace("{who}", who), f"I am {re.sub('^an? ', 'the ', who)}. {speech(rng)}"

    def pirate(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        is_sailor = re.search("pirate|captain|sailor|sea", line, re.I)
        return line, " ".join(rng.sample(PIECES["speech"]["sailor"], 2)) if is_sailor else speech(rng)

    def battle(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        return line, f"{insult(rng)} {speech(rng)}"

    def love_letter(self, rng: random.Random, split: str, line: str) -> tuple[str, str]:
        return line, rng.choice(PIECES["praise"]["opening"]) + "\n" + ode(rng, "love")


def ode(rng: random.Random, topic: str) -> str:
    """Four lines about anything."""
    return "\n".join(rng.choice(PIECES["ode"][part]) for part in ("first", "second", "third", "fourth")).replace(
        "{topic}", topic
    )


def speech(rng: random.Random) -> str:
    first, second, third = (rng.choice(PIECES["speech"][part]) for part in ("first", "second", "third"))
    return f"{first} {second if first.endswith(',') else capitalize_first(second)} {third}"


def usable(speech: str) -> bool:
    return not looks_broken(speech) and not is_refusal(speech)


def insult(rng: random.Random) -> str:
    """Thou craven onion-eyed whey-face!"""
    pieces = PIECES["insult"]
    first, second, noun = (rng.choice(pieces[part]) for part in ("first", "second", "noun"))
    return f"Thou {first} {second} {noun}!{rng.choice(pieces['ends'])}"
