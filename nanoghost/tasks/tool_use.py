"""Two tasks that need a tool: a small program that Python runs, and a document that must be looked up and cited.

The default SFT mix does not contain them: `sft --data tools` adds them, and `rl --tasks programs,lookup` trains on
them. The solutions are written without running anything; RL runs what the model writes, in the sandbox.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from nanoghost.tasks.base import Problem, Task, split_of
from nanoghost.tasks.messages import assistant, final_text, tool_call_messages, tool_results, user
from nanoghost.tasks.names import FIRST_NAMES, PLACES, SURNAMES
from nanoghost.tasks.spelling import WordTask, quote
from nanoghost.tasks.wording import choose_template, load_phrases
from nanoghost.tools.registry import PYTHON, TOOLS, lookup_tool, numbered_passages, run_tool
from nanoghost.tools.retrieval import Passage, TextIndex

PROGRAM_PHRASES, DOCUMENT_PHRASES = load_phrases("tool_use")["programs"], load_phrases("tool_use")["documents"]
SPELLING_PROGRAMS = ("count", "length", "backward")
"""Kinds of programs about a word. The word alone decides their split."""


class Programs(WordTask):
    """With Python, how many s are in "possess"? Correct: a program printed the result, and the answer ends with it."""

    name = "programs"
    label = "programs in Python"
    weight = 0.2
    mixes = ("tools",)
    evaluated = False
    needs_sandbox = True

    def problem(self, rng: random.Random, split: str) -> Problem:
        while True:
            kind = rng.choice(list(PROGRAM_PHRASES))
            slots = self.draw_slots(rng, split)
            code = PROGRAM_PHRASES[kind]["code"].format(**slots)
            if kind in SPELLING_PROGRAMS or split_of(code) == split:
                break
        question = choose_template(rng, PROGRAM_PHRASES[kind][split], split).format(**slots)
        value = eval(code)  # our own code, from the file of phrases
        answer = rng.choice(("{}", "{}.", "The answer is {}.", "Python says {}.")).format(value)
        call = tool_call_messages("python", "code", code, repr(value), "call_python")
        return Problem(self.name, (user(question),), (*call, assistant(answer)), str(value), tools=("python",))

    def draw_slots(self, rng: random.Random, split: str) -> dict:
        word = self.draw_word(rng, split)
        return {
            "word": word,
            "numbers": [rng.randint(2, 99) for _ in range(rng.randint(3, 6))],
            "quoted": quote(rng, word),
            "letter": rng.choice(word.lower()),
            "large": rng.randint(100, 9999),
            "base": rng.randint(2, 30),
            "small": rng.randint(2, 5),
        }

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        printed = [result.strip("'\"") for result in tool_results(reply, "python")]
        answer_at_end = re.search(rf"(?<![\w.-]){re.escape(problem.answer)}\W*$", final_text(reply))
        return float(problem.answer in printed and answer_at_end is not None)


# ── lookup ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PEOPLE = 300
"""Number of people in the synthetic documents."""


@dataclass(frozen=True)
class SyntheticDocument:
    """One sentence about a person who does not exist."""

    kind: str
    person: str
    value: str
    text: str

    @property
    def source(self) -> str:
        return f"{self.kind}/{self.person.lower().replace(' ', '_')}.md"


@cache
def synthetic_documents() -> tuple[list[SyntheticDocument], TextIndex]:
    """The documents and their index. They are random, so that the answers cannot be known without them."""
    rng = random.Random("notes")
    people = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in SURNAMES], PEOPLE)
    documents = []
    for person in people:
        for kind, phrases in rng.sample(list(DOCUMENT_PHRASES.items()), len(DOCUMENT_PHRASES)):
            value = rng.choice(phrases.get("values", PLACES))
            text = phrases["text"].format(person=person, value=value)
            documents.append(SyntheticDocument(kind, person, value, text))
    return documents, TextIndex([document.text for document in documents])


def search_synthetic(query: str) -> list[Passage]:
    documents, index = synthetic_documents()
    matches = [documents[i] for i in index.search(query, 3)]
    return [Passage(match.source, "", match.text, match.text) for match in matches]


class Lookup(Task):
    """Look up where Anna Holt lives. Correct: the tool returned it, and the answer contains it and cites its passage.

    A search for the name returns everything about the person: the model must read which passage answers the question.
    """

    name = "lookup"
    label = "lookup with citation"
    weight = 0.2
    mixes = ("tools",)
    evaluated = False

    def problem(self, rng: random.Random, split: str) -> Problem:
        while True:
            document = rng.choice(synthetic_documents()[0])
            content = numbered_passages(search_synthetic(document.person)).content
            numbers = [line[1] for line in content.split("\n") if line.endswith(document.text)]  # "[2] ..."
            if split_of(document.person) == split and numbers:
                break
        phrases = DOCUMENT_PHRASES[document.kind]
        question = choose_template(rng, phrases[split], split).format(person=document.person)
        answer = rng.choice(phrases["answer"]).format(person=document.person, value=document.value, n=numbers[0])
        call = tool_call_messages("lookup", "query", document.person, content, "call_lookup")
        return Problem(self.name, (user(question),), (*call, assistant(answer)), document.text, tools=("lookup",))

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        citations = []
        for result in tool_results(reply, "lookup"):
            citations += [line[:3] for line in result.split("\n") if line.endswith(problem.answer)]
        text = final_text(reply)
        value = problem.answer.rstrip(".").split()[-1]
        is_cited = any(citation in text for citation in citations)
        return float(is_cited and re.search(rf"\b{value}\b", text) is not None)


# ── the tools in RL and evaluation ───────────────────────────────────────────────────────────────────────────────────

# Rollouts of one problem are similar: each program is run only once.
CACHED_PYTHON = replace(PYTHON, function=lru_cache(maxsize=4096)(PYTHON.function))


def tool_runner(names: set[str]) -> Callable[[dict], str]:
    """A function that runs calls of these tools. The lookup tool searches the synthetic documents."""
    all_tools = TOOLS | {"python": CACHED_PYTHON, "lookup": lookup_tool(search_synthetic)}
    tools = {name: all_tools[name] for name in names}
    return lambda call: run_tool(call, tools)
