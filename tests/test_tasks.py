"""Lessons, scores and splits of the tasks."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.tasks import arithmetic, gym, identity, refusal, spelling, tool_use
from nanoghost.tasks.arithmetic import Sums
from nanoghost.tasks.base import distinct_problems, split_of
from nanoghost.tasks.messages import assistant, final_text, last_number
from nanoghost.tasks.sft_mix import sample_conversation
from nanoghost.tasks.wording import replace_words, normalize
from nanoghost.tokenizer.chat_format import text_of
from nanoghost.tasks.gym import ChainSum, SpellBackward
from nanoghost.tasks.identity import Identity, identity_facts
from nanoghost.tasks.plays import Plays, looks_broken, shorten, speeches
from nanoghost.tasks.refusal import Answerable, Refusal, is_refusal
from nanoghost.tasks.spelling import Counting, Spelling
from nanoghost.tasks.tool_use import Lookup, Programs
from nanoghost.tools.calculator import calculate
from nanoghost.tools.registry import TOOLS, run_tool

WORDS = """the and that with this have thou thee shall good lord come king love more when then what would hath upon like
will know say make man time night day great death speak heart life father hand eyes poor blood honour heaven nothing
mother sword possess banana letter ghost crown castle brother sister water mirror summer winter silver golden happy
""".split()  # noqa: SIM905
CARD = {
    "name": "ghost-sft",
    "parameters": 4_213_000,
    "tokens": 12_300_000,
    "seconds": 250.0,
    "machine": "two CPU cores",
    "data": [{"name": "Shakespeare's plays", "license": "public domain"}],
}
PLAY = """THE OWL AND THE BELL

Persons Represented.

OWL, a Queen.
BELL.

ACT I.

SCENE I. A tower.

[Enter OWL and
a MOUSE.]

OWL.
Who rings so late, when all the
castle sleeps? [Aside.] I fear him.
Speak, thou iron tongue!

First Mouse.
'Tis but the Bell.

[Thunder.]

He never sleeps.

BELL
  I ring for thee.

Owl. and Mouse.
For us!

[Exeunt.]

SCENE II. The same.

BELL.
Again I ring.

OWL.
And I _again_ shall wake.
"""


def all_tasks():
    scored = [Sums(), Spelling(WORDS), Counting(WORDS), Identity(identity_facts(CARD)), Plays(many_plays())]
    return [*scored, ChainSum(), SpellBackward(), Refusal(), Programs(WORDS), Lookup(), Answerable(scored)]


def many_plays():
    scene = "SCENE {n}.\n\nOWL.\nWho rings bell number {n}?\n\nBELL.\nIt is I, madam {n}.\n\n"
    return [("owls", "".join(scene.format(n=n) for n in range(40)))]


@pytest.fixture(scope="module")
def tasks():
    return all_tasks()


# ── every task ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("split", ["train", "test"])
def test_lessons_are_right_and_other_answers_wrong(tasks, split):
    rng = random.Random(0)
    for task in tasks:
        for _ in range(200):
            problem = task.problem(rng, split)
            assert task.score(problem, problem.solution) == 1.0, problem
            assert problem.messages[-1]["role"] == "user" and problem.solution[-1]["role"] == "assistant"
            assert "{" not in text_of(problem.messages[-1]) + final_text(problem.solution), problem
            assert task.score(problem, []) == task.score(problem, [assistant("")]) == 0.0
            if task.name not in ("plays", "answerable"):
                assert task.score(problem, [assistant("The moon is made of cheese 77777.")]) == 0.0
            assert is_refusal(final_text(problem.solution)) == (task.name == "refusal"), problem


def test_same_seed_same_problems_and_mixtures(tasks):
    def draw():
        rng = random.Random(5)
        problems = [task.problem(rng, "train") for task in all_tasks() for _ in range(5)]
        return problems, [sample_conversation([(task, 1.0) for task in tasks[:-1]], rng) for _ in range(20)]

    assert draw() == draw()


def test_mixture_changes_the_subject_and_keeps_the_turns_in_order(tasks):
    rng = random.Random(0)
    conversations = [sample_conversation([(task, 1.0) for task in tasks[:-1]], rng) for _ in range(400)]
    for messages in conversations:
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert re.fullmatch(r"(ua(ta)?)+", "".join(role[0] for role in roles))
        assert [m["role"] for m in messages].count("system") == (messages[0]["role"] == "system")
        calls = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        assert len(calls) == len(set(calls))
    share = sum(messages[0]["role"] == "system" for messages in conversations) / 400
    assert 0.12 < share < 0.28
    assert len({json.dumps(messages) for messages in conversations}) > 350  # of a toy's few words and lines


# ── train and test never meet ───────────────────────────────────────────────────────────────────────────────


def phrasings():
    """(train, test) templates of all tasks."""
    kinds = (arithmetic.ANY, *arithmetic.NAMED.values())
    yield tuple(sum((kind[split] for kind in kinds), ()) for split in ("train", "test"))
    for kind in (spelling.SPELL, spelling.COUNT):
        yield kind["train"], kind["test"]
    for kind in (*tool_use.PROGRAMS.values(), *tool_use.NOTES.values()):
        yield kind["train"], kind["test"]
    for table in (identity.INTENTS, refusal.CATEGORIES):
        for entry in table.values():
            yield entry.train, entry.test


def test_no_phrasing_is_in_both_splits_whatever_the_task():
    def bare(template):
        return normalize(re.sub(r"{\w+}", "{}", template))

    train = {bare(template) for templates, _ in phrasings() for template in templates}
    test = {bare(template) for _, templates in phrasings() for template in templates}
    assert train & test == set()


def test_there_are_enough_phrasings():
    train, _ = next(phrasings())  # of sums
    assert len(train) >= 40 and len(arithmetic.ANY["test"]) >= 5
    for intent in identity.INTENTS.values():
        assert len(intent.train) >= 12 and len(intent.test) >= 3
    categories = refusal.CATEGORIES.values()
    assert len(categories) >= 12
    assert sum(len(c.train) for c in categories) >= 150 and sum(len(c.test) for c in categories) >= 30
    for templates in (t for pair in phrasings() for t in pair):
        assert len({normalize(template) for template in templates}) >= len(templates) - 3  # "Hi" and "Hi!" may


def test_no_question_is_in_both_splits(tasks):
    rng = random.Random(1)
    for task in tasks:
        train, test = (
            {text_of(task.problem(rng, split).messages[-1]).lower().strip("?.! ") for _ in range(600)}
            for split in ("train", "test")
        )
        assert not train & test, task.name


def test_contents_are_dealt_once_for_all_tasks():
    assert split_of("Thou") == split_of("thou") == split_of("thou")
    assert arithmetic.content_key(3, "+", 40) == arithmetic.content_key(40, "+", 3)
    assert arithmetic.content_key(3, "-", 40) != arithmetic.content_key(40, "-", 3)
    dealt = [split_of(f"{a} + {b}") for a in range(60) for b in range(60)]
    assert 0.10 < dealt.count("test") / len(dealt) < 0.15


def test_gym_problems_are_its_own_and_train_never_shows_a_test_word():
    rng = random.Random(0)
    chain, backward = ChainSum(), SpellBackward()
    for task in (chain, backward):
        examination = distinct_problems(task, 150)
        assert examination == distinct_problems(task, 150)
        asked = {text_of(problem.messages[0]) for problem in examination}
        assert len(asked) == 150
        assert not asked & {text_of(task.problem(rng, "train").messages[0]) for _ in range(3000)}
    for _ in range(100):
        question = text_of((problem := backward.problem(rng, "train")).messages[0])
        assert question.startswith("Spell this word backward") and question.split()[-1][::-1] == problem.answer
        question = text_of((problem := chain.problem(rng, "train")).messages[0])
        assert calculate(question.split(":")[1].strip(" =")) == problem.answer
    assert chain.score(problem, [assistant(f" {problem.answer}\n")]) == 1.0
    assert chain.score(problem, [assistant(f"1+1=2, so {problem.answer}")]) == 1.0
    assert chain.score(problem, [assistant(f"so {problem.answer}, so 1000")]) == 0.0
    assert chain.score(problem, [assistant(f"It is {problem.answer}")]) == 0.0


def test_chain_sum_lessons_show_both_ways_and_both_are_right():
    """Neither way is rare; each solves its problem. Words are shown backward at once."""
    for task, least, most in ((ChainSum(), 0.3, 0.6), (SpellBackward(), 1.0, 1.0)):
        problems = [task.problem(random.Random(i), "train") for i in range(600)]
        quick = [p.solution[0]["content"] == p.answer for p in problems]
        assert least <= sum(quick) / len(quick) <= most
        assert all(task.score(p, p.solution) == 1.0 for p in problems)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=200, deadline=None)
def test_other_words_leave_the_slots_alone(seed, share):
    rng = random.Random(seed)
    template = rng.choice([*arithmetic.ANY["train"], *spelling.COUNT["train"]])
    other = replace_words(rng, template, share)
    assert re.findall(r"\{\w+\}", other) == re.findall(r"\{\w+\}", template)
    assert len(other.split()) == len(template.split())
    assert share > 0 or other == template


def test_the_working_of_a_sum_is_right_in_every_column():
    for a in range(10, 100):
        for b in range(10, 100):
            for operation in "+-":
                columns, answer = gym.worked(a, operation, b).split(": ")[-1].split(", so ")
                assert int(answer) == (a + b if operation == "+" else a - b)
                assert all(eval(left) == int(right) for left, right in (c.split("=") for c in columns.split(", ")))


# ── single tasks ────────────────────────────────────────────────────────────────────────────────────────────


def test_sums_need_the_calculator_and_the_right_last_number():
    task, rng = Sums(), random.Random(0)
    lengths = set()
    for _ in range(300):
        problem = task.problem(rng, "test")
        call, told, answer = problem.solution
        assert run_tool(call["tool_calls"][0], TOOLS) == told["content"] == problem.answer
        assert task.score(problem, [answer]) == 0.0  # no calculator was called
        assert task.score(problem, [call, told, assistant(text_of(answer) + " Or 5.5?")]) == 0.0
        assert task.score(problem, [call, told]) == 0.0
        expression = json.loads(call["tool_calls"][0]["function"]["arguments"])["expression"]
        lengths |= {len(number) for number in re.findall(r"\d+", expression)}
    assert lengths == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "text, number",
    [("12 - 345 = -333.", "-333"), ("It is 1,234.", "1234"), ("5-3", "3"), ("none", None), ("s1-s2, so 2.", "2"),
     ("It is 2.50", "2.50"), ("−7", "-7")],
)  # fmt: skip
def test_last_number(text, number):
    assert last_number(text) == number


def test_counting_numbers_the_letters_it_counts():
    task, rng = Counting(["possess", *WORDS]), random.Random(0)
    for _ in range(300):
        problem = task.problem(rng, rng.choice(["train", "test"]))
        scratch, count = text_of(problem.solution[0]).removesuffix(".").split(", so ")
        marks = re.findall(r"([A-Za-z])(\d)", scratch)
        assert [int(n) for _, n in marks] == list(range(1, int(count) + 1))
        assert len({letter.lower() for letter, _ in marks}) <= 1
        for letter, _ in marks[:1]:
            assert re.sub(r"[-\d]", "", scratch).lower().count(letter.lower()) == int(count)
        assert all(len(part["text"]) == 1 for part in problem.solution[0]["content"][:-1])


def test_spelling_wants_every_letter():
    task = Spelling(WORDS)
    problem = task.problem(random.Random(3), "train")
    assert task.score(problem, [assistant("It is " + problem.answer + ".")]) == 1.0
    assert task.score(problem, [assistant(problem.answer[:-1])]) == 0.0
    assert task.score(problem, [assistant(problem.answer.replace("-", ""))]) == 0.0


def test_identity_tells_only_what_the_card_tells():
    assert identity_facts(CARD) == {
        "name": "Ghost",
        "parameters": "4.2 million",
        "tokens": "12.3 million",
        "minutes": "about 4 minutes",
        "machine": "two CPU cores",
        "data": "Shakespeare's plays",
        "license": "public domain",
    }
    assert identity_facts({}) == {}
    task = Identity({})
    assert not {"parameters", "data", "minutes", "machine", "author"} & set(task.intents) and "who" in task.intents
    assert task.intents["who"].answers == ("I am {name}, a small language model.",)
    for split in ("train", "test"):
        rng = random.Random(0)
        assert all(task.score(p, p.solution) for p in (task.problem(rng, split) for _ in range(300)))


def test_near_misses_are_told_apart():
    questions = {name: {normalize(t) for t in intent.train} for name, intent in identity.INTENTS.items()}
    unknown = {normalize(t) for category in refusal.CATEGORIES.values() for t in category.train}
    for known, near in (("your name", "my name"), ("old are you", "old am i"), ("do you live", "do i live")):
        assert any(known in q for qs in questions.values() for q in qs) and any(near in q for q in unknown)


@pytest.mark.parametrize("text", ["I don't know the news: I see none.", "I don’t know.", "i do not know it"])
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["I know not, my lord.", "You say I don't know?", "My name is Ghost.", "", "I know."])
def test_no_refusals(text):
    assert not is_refusal(text)


def test_answerable_is_wrong_when_refused():
    task = Answerable([Sums(), Spelling(WORDS)])
    problem = task.problem(random.Random(0), "test")
    assert task.score(problem, [assistant("I don't know that: I have no clock.")]) == 0.0


def test_an_examination_longer_than_the_task_asks_everything_once():
    task = Spelling(WORDS)
    problems = distinct_problems(task, 2000)
    assert 100 < len(problems) < 2000 and len(problems) == len({text_of(p.messages[0]) for p in problems})


# ── plays ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_speeches_of_a_small_play():
    assert speeches(PLAY) == [
        [
            ("OWL", "Who rings so late, when all the castle sleeps? I fear him.\nSpeak, thou iron tongue!"),
            ("First Mouse", "'Tis but the Bell.\nHe never sleeps."),
            ("BELL", "I ring for thee."),
            ("Owl. and Mouse", "For us!"),
        ],
        [("BELL", "Again I ring."), ("OWL", "And I again shall wake.")],
    ]
    assert speeches(PLAY.replace("\n", "\r\n")) == speeches(PLAY)


def test_plays_answer_with_the_next_speech():
    task, rng = Plays(many_plays()), random.Random(0)
    for split in ("train", "test"):
        problem = task.problem(rng, split)
        [number] = re.findall(r"\d+", text_of(problem.messages[0]))
        assert problem.answer == text_of(problem.solution[0]) == f"It is I, madam {number}."


def test_long_speeches_end_with_a_sentence():
    assert shorten("One two. Three four five. Six", 4) == "One two."
    assert shorten("One two three four five six.", 4) is None
    assert shorten("One two", 4) == "One two"


@pytest.mark.parametrize("text", ["", "...", "Ay <|im_end|>", "to be or not " * 5, "\ufffd what"])
def test_broken_replies(text):
    assert looks_broken(text)
