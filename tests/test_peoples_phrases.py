"""phrases/people/*.toml: every line fits its table, whole families are held out, and the tasks that draw them."""

import random
import re

import pytest

from nanoghost.tasks import wording
from nanoghost.tasks.everyday_sums import FORMS, EverydaySums, draw_values, words_of
from nanoghost.tasks.identity import INTENTS, PEOPLES_INTENTS
from nanoghost.tasks.letters import KINDS, Letters, numbered
from nanoghost.tasks.messages import assistant, final_text
from nanoghost.tasks.recall import Recall
from nanoghost.tasks.refusal import CATEGORIES, PEOPLES_CATEGORIES
from nanoghost.tasks.wording import choose_alternatives, mistype, people_phrases, phrasings, split_families
from nanoghost.tokenizer.chat_format import text_of
from nanoghost.tools.calculator import calculate

PEOPLE = people_phrases()
SLOTS = {
    "sum": {"sum"}, "check": {"sum", "guess"}, "spell": {"word"}, "count_letter": {"letter", "word"},
    "length": {"word"}, "first_letter": {"word"}, "last_letter": {"word"}, "nth_letter": {"nth", "word"},
    "backward": {"word"},
    "letter_after": {"letter"}, "letter_before": {"letter"}, "alphabet_nth": {"nth"}, "count_up": {"n"},
    "count_down": {"n"}, "join": {"spelled"}, "count_words": {"sentence"}, "author": {"play"}, "introduce": {"person"},
    "poem_about": {"topic"}, "continue": {"line"}, "character": {"who"},
}  # fmt: skip
WORDS = [
    f"{first}{second}"
    for first in ("bat", "car", "dim", "fog", "hen", "jug")
    for second in ("man", "pet", "son", "tip")
]


def slots_in(text: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", text))


def lists() -> dict[str, tuple]:
    """Every list of lines by its name: "about name", "sum"."""
    found = {}
    for table, value in PEOPLE.items():
        if isinstance(value, dict):
            found |= {f"{table} {name}": lines for name, lines in value.items()}
        elif table not in ("told", "problems"):
            found[table] = value
    return found


@pytest.mark.parametrize("name", lists())
def test_lines_have_the_slots_of_their_list(name):
    for line in lists()[name]:
        for seed in range(5):
            text = choose_alternatives(random.Random(seed), line)
            assert slots_in(text) == SLOTS.get(name.split()[-1], set()), line
            assert "[" not in text and "]" not in text, line


def test_problems_have_an_expression_of_their_numbers():
    rng = random.Random(0)
    for line, formula in PEOPLE["problems"]:
        assert slots_in(formula) <= slots_in(line), line
        values = draw_values(rng, formula)
        assert not calculate(formula.format(**values)).startswith("error"), (line, formula)


def test_told_things_can_be_said_asked_and_corrected():
    for fact in PEOPLE["told"]:
        kind = {"kind"} if "kinds" in fact else set()
        assert re.match(r"(your|what|where|how|which|who|the|when|that) ", fact["topic"]), fact
        assert "{value}" in fact["answer"]
        assert fact["number"] or len(fact["values"]) >= 5, fact["what"]
        for key, slots in (("say", {"value"}), ("ask", set()), ("correct", {"value", "old"})):
            for line in fact[key]:
                assert slots <= slots_in(line) <= slots | kind, line


def test_every_list_has_an_answer():
    for table in ("about", "talk", "nonsense"):
        assert {PEOPLES_INTENTS.get(name, name) for name in PEOPLE[table]} <= set(INTENTS)
    assert {PEOPLES_CATEGORIES.get(name, name) for name in PEOPLE["unknown"]} <= set(CATEGORIES)
    assert set(KINDS) <= set(PEOPLE)


@pytest.mark.parametrize("name", lists())
def test_whole_families_are_held_out(name):
    lines = lists()[name]
    test, train = split_families(lines, "test"), split_families(lines, "train")
    assert test
    assert train
    held_out = frozenset().union(*map(phrasings, test))
    assert not held_out & frozenset().union(*map(phrasings, train))


def test_a_mistyped_word_differs_in_one_place():
    rng = random.Random(0)
    for _ in range(300):
        word = wording.made_up_word(rng)
        typed = mistype(rng, word)
        assert abs(len(typed) - len(word)) <= 1
        assert typed[0] == word[0]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_expressions_of_every_form_have_a_value(form):
    rng = random.Random(0)
    results = [calculate(form(rng)) for _ in range(300)]
    errors = sum(result.startswith("error") for result in results)
    assert errors == (300 if form.__name__ in ("by_zero", "unknown_word") else 0), results


@pytest.mark.parametrize("number", [0, 7, 13, 20, 21, 99, 100, 105, 342, 1000, 20_017, 999_999])
def test_number_words_are_read_back(number):
    assert calculate(words_of(number)) == str(number)


def test_a_call_copies_the_expression_with_the_blank_before_it():
    task, rng = EverydaySums(), random.Random(0)
    copied = 0
    for _ in range(300):
        problem = task.problem(rng, "train")
        expression = problem.solution[0]["tool_calls"][0]["function"]["arguments"]
        value = re.search(r'"expression": "(.*)"', expression)[1]
        copied += value in text_of(problem.messages[0])
    assert copied > 150


def test_letters_are_numbered():
    assert "".join(numbered("cat")) == "c1-a2-t3"


ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def expected_answer(kind: str, slots: dict, text: str) -> str:
    """The answer, found in another way than by the task; `text` is the whole one."""
    word = slots.get("word", "").strip("\"'")
    match kind:
        case "length":
            return str(len(word))
        case "first_letter":
            return word[:1]
        case "last_letter":
            return word[-1:]
        case "nth_letter":
            return word[text.count("-")]
        case "backward":
            return "-".join(word[::-1])
        case "letter_after" | "letter_before":
            return ALPHABET[ALPHABET.index(slots["letter"].lower()) + (1 if kind == "letter_after" else -1)]
        case "alphabet_nth":
            return ALPHABET[int(text.split()[1]) - 1]
        case "count_up":
            return ", ".join(str(n + 1) for n in range(int(slots["n"])))
        case "count_down":
            return ", ".join(str(int(slots["n"]) - n) for n in range(int(slots["n"])))
        case "join":
            return re.sub(r"[^a-z]", "", slots["spelled"].lower())
    return str(len(slots["sentence"].split()))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_about_letters(kind):
    task, rng = Letters(WORDS), random.Random(0)
    for _ in range(50):
        slots, parts, answer = getattr(task, kind)(rng, "train")
        assert answer == expected_answer(kind, slots, "".join(parts))
        assert "".join(parts).rstrip(".").endswith(answer)


def test_what_was_told_is_in_the_conversation():
    task, rng = Recall(["king", "galaxy"]), random.Random(0)
    for split in ("train", "test"):
        for _ in range(300):
            problem = task.problem(rng, split)
            told = " ".join(text_of(message) for message in problem.messages if message["role"] == "user")
            assert problem.answer in told
            assert bool(problem.answer) != final_text(problem.solution).startswith("I don't know")
            assert task.score(problem, [assistant("I don't know that.")]) == float(not problem.answer)
