"""Two tasks that need a tool: a small program that Python runs, and a note that must be looked up and cited.

They are no part of the lessons that the speedrun gives: `--data tools` adds them (tasks/mix.py), and `rl --tasks programs,notes`
practises them. Lessons are written without running anything; the practice runs what the model writes, in the sandbox.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache

from nanoghost.tasks.base import Problem, assistant, final_text, phrases, split_of, text_of, user, wording
from nanoghost.tasks.names import FIRST_NAMES, PLACES, SURNAMES
from nanoghost.tasks.spelling import _Words, quoted
from nanoghost.tools.registry import TOOLS, lookup_tool, numbered_passages, run_tool
from nanoghost.tools.retrieval import Passage, TextIndex

PROGRAMS, NOTES = phrases("tooluse")["programs"], phrases("tooluse")["notes"]
PEOPLE = 300
"""Who are in the notes."""


def called(name: str, argument: str, value: str, content: str) -> tuple[dict, dict]:
    """The messages of a call with one argument, and of its answer."""
    function = {"name": name, "arguments": json.dumps({argument: value}, ensure_ascii=False)}
    call = {"id": f"call_{name}", "type": "function", "function": function}
    return assistant("") | {"tool_calls": [call]}, {"role": "tool", "tool_call_id": call["id"], "content": content}


def told_by(reply: Sequence[dict], tool: str) -> list[str]:
    """What a tool answered in a reply."""
    names, told = {}, []
    for message in reply:  # in order: each message of a model's counts its calls anew
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls") or ()}
        if message["role"] == "tool" and names[message["tool_call_id"]] == tool:
            told.append(text_of(message))
    return told


class Programs(_Words):
    """With Python, how many s are in "possess"? Right: a program printed the result, and the answer ends with it."""

    name = "programs"

    def problem(self, rng: random.Random, split: str) -> Problem:
        while True:
            kind = rng.choice(list(PROGRAMS))
            word, numbers = self.draw(rng, split), [rng.randint(2, 99) for _ in range(rng.randint(3, 6))]
            slots = {"word": word, "quoted": quoted(rng, word), "letter": rng.choice(word.lower()), "numbers": numbers,
                     "large": rng.randint(100, 9999), "base": rng.randint(2, 30), "small": rng.randint(2, 5)}  # fmt: skip
            code = PROGRAMS[kind]["code"].format(**slots)
            if kind in ("count", "length", "backward") or split_of(code) == split:
                break
        question = wording(rng, PROGRAMS[kind][split], split).format(**slots)
        value = eval(code)  # ours, from the file of phrases
        answer = rng.choice(("{}", "{}.", "The answer is {}.", "Python says {}.")).format(value)
        lesson = (*called("python", "code", code, repr(value)), assistant(answer))
        return Problem(self.name, (user(question),), lesson, str(value), tools=("python",))

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        printed = [told.strip("'\"") for told in told_by(reply, "python")]
        ends = re.search(rf"(?<![\w.-]){re.escape(problem.answer)}\W*$", final_text(reply))
        return float(problem.answer in printed and bool(ends))


@cache
def library() -> tuple[list[dict], TextIndex]:
    """The notes that are looked up, made of names and of chance: nothing in them can be known otherwise."""
    rng = random.Random("notes")
    people = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in SURNAMES], PEOPLE)
    notes = []
    for person in people:
        for kind, texts in rng.sample(list(NOTES.items()), len(NOTES)):
            value = rng.choice(texts.get("values", PLACES))
            text = texts["note"].format(person=person, value=value)
            notes.append({"kind": kind, "person": person, "value": value, "text": text})
    return notes, TextIndex([note["text"] for note in notes])


def search(query: str) -> list[Passage]:
    notes, index = library()
    found = [notes[i] for i in index.search(query, 3)]
    return [
        Passage(f"{note['kind']}/{note['person'].lower().replace(' ', '_')}.md", "", note["text"], note["text"])
        for note in found
    ]


class Notes:
    """Look up where Anna Holt lives. Right: lookup found it, and the answer has it with the number of its passage.

    A search for the name finds all that the notes say of somebody: which of it is asked for, is to be read.
    """

    name = "notes"

    def problem(self, rng: random.Random, split: str) -> Problem:
        while True:
            note = rng.choice(library()[0])
            content = numbered_passages(search(note["person"])).content
            numbers = [line[1] for line in content.splitlines() if line.endswith(note["text"])]
            if split_of(note["person"]) == split and numbers:
                break
        texts = NOTES[note["kind"]]
        question = wording(rng, texts[split], split).format(**note)
        answer = rng.choice(texts["answer"]).format(**note, n=numbers[0])
        lesson = (*called("lookup", "query", note["person"], content), assistant(answer))
        return Problem(self.name, (user(question),), lesson, note["text"], tools=("lookup",))

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        lines = [
            line for told in told_by(reply, "lookup") for line in told.splitlines() if line.endswith(problem.answer)
        ]
        said, value = final_text(reply), problem.answer.rstrip(".").split()[-1]
        return float(any(line[:3] in said for line in lines) and re.search(rf"\b{value}\b", said) is not None)


# attempts at one problem are much alike: a program is run once
PYTHON = replace(TOOLS["python"], function=lru_cache(maxsize=4096)(TOOLS["python"].function))


def practice(names: set[str]) -> Callable[[dict], str]:
    """What runs calls of the tools of these names in attempts at problems; lookup looks into the library."""
    every = TOOLS | {"python": PYTHON, "lookup": lookup_tool(search)}
    tools = {name: every[name] for name in names}
    return lambda call: run_tool(call, tools)
