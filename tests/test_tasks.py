"""Problems, solutions, scores and splits of the tasks, and their registry."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.tasks import arithmetic, gym, identity, refusal, spelling, tool_use
from nanoghost.tasks.arithmetic import Sums
from nanoghost.tasks.base import MIXES, TaskContext, distinct_problems, split_of
from nanoghost.tasks.gym import ChainSum, SpellBackward
from nanoghost.tasks.identity import Identity, identity_facts
from nanoghost.tasks.messages import assistant, final_text, last_number
from nanoghost.tasks.plays import Plays, looks_broken, shorten, split_into_scenes
from nanoghost.tasks.refusal import Answerable, is_refusal
from nanoghost.tasks.registry import DEFAULT_RL_TASKS, RL_TASKS, TASKS, build_tasks
from nanoghost.tasks.sft_mix import sample_conversation, tasks_of_mix
from nanoghost.tasks.spelling import Counting, Spelling
from nanoghost.tasks.wording import normalize, replace_words
from nanoghost.tokenizer.chat_format import text_of
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


def play_scenes():
    scene = "SCENE {n}.\n\nOWL.\nWho rings bell number {n}?\n\nBELL.\nIt is I, madam {n}.\n\n"
    return [("owls", "".join(scene.format(n=n) for n in range(40)))]


def verse_scenes():
    """Scenes of one speech of five lines; no words are repeated."""
    verse = "".join(f"Thus {{n}} {' '.join(WORDS[6 * i : 6 * i + 6])};\n" for i in range(5))
    scene = f"SCENE {{n}}.\n\nOWL.\n{verse}\n"
    return [("verses", "".join(scene.format(n=n) for n in range(40)))]


def new_tasks():
    return list(build_tasks(TaskContext(identity_facts(CARD), WORDS, play_scenes() + verse_scenes())).values())


@pytest.fixture(scope="module")
def tasks():
    return new_tasks()


# ── the registry ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_task_has_a_name_and_a_label_of_its_own():
    assert len({task.name for task in TASKS}) == len({task.label for task in TASKS}) == len(TASKS)


def test_all_tasks_can_be_built(tasks):
    assert [task.name for task in tasks] == [task.name for task in TASKS]


def test_the_plays_need_a_model_that_was_pretrained_on_them():
    tasks = build_tasks(TaskContext({}, WORDS))
    assert "plays" not in tasks
    assert [task.name for task in tasks["answerable"].tasks] == ["identity", "sums", "spelling", "counting"]


def test_rl_trains_on_every_task_with_a_correct_answer():
    assert DEFAULT_RL_TASKS == ["chain_sum", "spell_backward"]
    assert set(RL_TASKS) == {task.name for task in TASKS} - {"plays", "creative"}


def test_evaluated_tasks():
    """The tasks of the report; the tool tasks are measured by RL only."""
    names = {task.name for task in TASKS if task.evaluated}
    assert names == {
        "creative", "identity", "sums", "everyday_sums", "spelling", "counting", "letters", "recall", "refusal",
        "answerable", "chain_sum", "spell_backward",
    }  # fmt: skip


def test_weights_of_the_builtin_mix(tasks):
    """The order counts, too: it decides which problems are drawn."""
    weights = [(task.name, task.weight) for task in tasks_of_mix("builtin", {task.name: task for task in tasks})]
    assert weights == [
        ("plays", 0.03),
        ("creative", 0.09),
        ("identity", 0.13),
        ("sums", 0.04),
        ("everyday_sums", 0.22),
        ("spelling", 0.12),
        ("counting", 0.13),
        ("letters", 0.18),
        ("recall", 0.22),
        ("refusal", 0.13),
        ("chain_sum", 0.12),
        ("spell_backward", 0.01),
    ]


def test_mixes_that_tasks_name_exist():
    assert {mix for task in TASKS for mix in task.mixes} == set(MIXES)


# ── every task ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("split", ["train", "test"])
def test_solutions_score_1_and_other_answers_0(tasks, split):
    rng = random.Random(0)
    for task in tasks:
        for _ in range(200):
            problem = task.problem(rng, split)
            assert task.score(problem, problem.solution) == 1.0, problem
            assert task.score(problem, []) == 0.0, problem
            assert task.score(problem, [assistant("")]) == 0.0, problem
            if task.name not in ("plays", "creative", "answerable"):
                assert task.score(problem, [assistant("The moon is made of cheese 77777.")]) == 0.0


@pytest.mark.parametrize("split", ["train", "test"])
def test_problems_end_with_a_question_and_solutions_with_an_answer(tasks, split):
    rng = random.Random(0)
    for task in tasks:
        for _ in range(200):
            problem = task.problem(rng, split)
            assert problem.messages[-1]["role"] == "user"
            assert problem.solution[-1]["role"] == "assistant"
            text = text_of(problem.messages[-1]) + final_text(problem.solution)
            assert "{" not in text, "all slots are filled"
            if task.name != "recall":  # which also has questions about what was not told
                assert is_refusal(final_text(problem.solution)) == (task.name == "refusal"), problem


def test_problems_and_conversations_depend_on_the_seed_alone():
    def draw():
        rng = random.Random(5)
        tasks = new_tasks()
        problems = [task.problem(rng, "train") for task in tasks for _ in range(5)]
        return problems, [sample_conversation(with_weight(tasks), rng) for _ in range(20)]

    assert draw() == draw()


def with_weight(tasks):
    return [task for task in tasks if task.weight]


@pytest.fixture(scope="module")
def conversations(tasks):
    rng = random.Random(0)
    return [sample_conversation(with_weight(tasks), rng) for _ in range(400)]


def test_turns_of_a_conversation_are_in_order(conversations):
    for messages in conversations:
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert re.fullmatch(r"(ua(ta)?)+", "".join(role[0] for role in roles))


def test_only_the_first_message_can_be_a_system_prompt(conversations):
    for messages in conversations:
        assert [m["role"] for m in messages].count("system") == (messages[0]["role"] == "system")
    fraction = sum(messages[0]["role"] == "system" for messages in conversations) / 400
    assert 0.12 < fraction < 0.28


def test_calls_of_a_conversation_have_ids_of_their_own_and_a_result_each(conversations):
    num_calls = []
    for messages in conversations:
        calls = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        assert calls == [message["tool_call_id"] for message in messages if message["role"] == "tool"]
        assert len(calls) == len(set(calls))
        num_calls.append(len(calls))
    assert max(num_calls) > 1, "some conversations have several sums"


def test_conversations_differ(conversations):
    assert len({json.dumps(messages) for messages in conversations}) > 350  # of few words and lines


# ── train and test are disjoint ──────────────────────────────────────────────────────────────────────────────────────


def phrasings():
    """(train, test) templates of all tasks."""
    of_sums = (arithmetic.ANY, *arithmetic.NAMED.values())
    yield (
        tuple(template for kind in of_sums for template in kind["train"]),
        tuple(template for kind in of_sums for template in kind["test"]),
    )
    for kind in (spelling.SPELL, spelling.COUNT):
        yield kind["train"], kind["test"]
    for kind in (*tool_use.PROGRAM_PHRASES.values(), *tool_use.DOCUMENT_PHRASES.values()):
        yield kind["train"], kind["test"]
    for table in (identity.INTENTS, refusal.CATEGORIES):
        for entry in table.values():
            if "".join(entry.train).strip():  # not the questions that are blank
                yield entry.train, entry.test


def test_no_phrasing_is_in_both_splits_of_any_task():
    def bare(template):
        return normalize(re.sub(r"{\w+}", "{}", template))

    train = {bare(template) for templates, _ in phrasings() for template in templates}
    test = {bare(template) for _, templates in phrasings() for template in templates}
    assert train & test == set()


def test_there_are_enough_phrasings():
    train, _ = next(phrasings())  # of sums
    assert len(train) >= 40
    assert len(arithmetic.ANY["test"]) >= 5
    for intent in identity.INTENTS.values():
        assert len(intent.train) in (0, 5) or len(intent.train) >= 12  # the others are in phrases/people
        assert len(intent.train) < 12 or len(intent.test) >= 3
    categories = refusal.CATEGORIES.values()
    assert len(categories) >= 12
    assert sum(len(c.train) for c in categories) >= 150
    assert sum(len(c.test) for c in categories) >= 30
    for templates in (t for pair in phrasings() for t in pair):
        assert len({normalize(template) for template in templates}) >= len(templates) - 3  # "Hi" and "Hi!" may


def test_no_question_is_in_both_splits(tasks):
    rng = random.Random(1)
    for task in tasks:
        train, test = (
            {"\n".join(map(text_of, task.problem(rng, split).messages)).lower().strip("?.! ") for _ in range(600)}
            for split in ("train", "test")
        )
        assert not train & test - {""}, task.name  # "?" and "???" are nothing but marks


def test_a_content_has_the_same_split_in_all_tasks():
    assert split_of("Thou") == split_of("thou") == split_of("thou")
    assert arithmetic.content_key(3, "+", 40) == arithmetic.content_key(40, "+", 3)
    assert arithmetic.content_key(3, "-", 40) != arithmetic.content_key(40, "-", 3)
    splits = [split_of(f"{a} + {b}") for a in range(60) for b in range(60)]
    assert 0.10 < splits.count("test") / len(splits) < 0.15


@pytest.mark.parametrize("task", [ChainSum(), SpellBackward()], ids=lambda task: task.name)
def test_gym_evaluation_problems_are_fixed_and_never_drawn_for_training(task):
    problems = distinct_problems(task, 150)
    assert problems == distinct_problems(task, 150)
    questions = {text_of(problem.messages[0]) for problem in problems}
    assert len(questions) == 150
    rng = random.Random(0)
    assert not questions & {text_of(task.problem(rng, "train").messages[0]) for _ in range(3000)}


def test_spell_backward_answers_are_the_reversed_words():
    task, rng = SpellBackward(), random.Random(0)
    for _ in range(100):
        problem = task.problem(rng, "train")
        question = text_of(problem.messages[0])
        assert question.startswith("Spell this word backward")
        assert question.split()[-1][::-1] == problem.answer


def test_chain_sum_answers_are_the_results():
    task, rng = ChainSum(), random.Random(0)
    for _ in range(100):
        problem = task.problem(rng, "train")
        expression = text_of(problem.messages[0]).split(":")[1].strip(" =")
        assert calculate(expression) == problem.answer


def test_chain_sum_scores_the_text_after_so():
    task = ChainSum()
    problem = task.problem(random.Random(0), "train")
    assert task.score(problem, [assistant(f" {problem.answer}\n")]) == 1.0
    assert task.score(problem, [assistant(f"1+1=2, so {problem.answer}")]) == 1.0
    assert task.score(problem, [assistant(f"so {problem.answer}, so 1000")]) == 0.0
    assert task.score(problem, [assistant(f"It is {problem.answer}")]) == 0.0


@pytest.mark.parametrize("task, least, most", [(ChainSum(), 0.3, 0.6), (SpellBackward(), 1.0, 1.0)])
def test_gym_solutions_are_direct_answers_or_worked_steps(task, least, most):
    """Chain sums are shown in both ways, neither of them rarely; words are shown backward at once."""
    problems = [task.problem(random.Random(i), "train") for i in range(600)]
    direct = [problem.solution[0]["content"] == problem.answer for problem in problems]
    assert least <= sum(direct) / len(direct) <= most
    assert all(task.score(problem, problem.solution) == 1.0 for problem in problems)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=200, deadline=None)
def test_replacing_words_keeps_the_slots(seed, fraction):
    rng = random.Random(seed)
    template = rng.choice([*arithmetic.ANY["train"], *spelling.COUNT["train"]])
    other = replace_words(rng, template, fraction)
    assert re.findall(r"\{\w+\}", other) == re.findall(r"\{\w+\}", template)
    assert len(other.split()) == len(template.split())
    assert fraction > 0 or other == template


def test_worked_steps_are_correct_in_every_column():
    for a in range(10, 100):
        for b in range(10, 100):
            for operation in "+-":
                columns, answer = gym.worked_steps(a, operation, b).split(": ")[-1].split(", so ")
                assert int(answer) == (a + b if operation == "+" else a - b)
                assert all(eval(left) == int(right) for left, right in (c.split("=") for c in columns.split(", ")))


# ── single tasks ────────────────────────────────────────────────────────────────────────────────────────────


def test_sums_need_the_calculator_and_the_correct_last_number():
    task, rng = Sums(), random.Random(0)
    lengths = set()
    for _ in range(300):
        problem = task.problem(rng, "test")
        call, result, answer = problem.solution
        assert run_tool(call["tool_calls"][0], TOOLS) == result["content"] == problem.answer
        assert task.score(problem, [answer]) == 0.0  # no calculator was called
        assert task.score(problem, [call, result, assistant(text_of(answer) + " Or 5.5?")]) == 0.0
        assert task.score(problem, [call, result]) == 0.0
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


def test_the_solution_of_counting_numbers_the_letters():
    task, rng = Counting(["possess", *WORDS]), random.Random(0)
    for _ in range(300):
        problem = task.problem(rng, rng.choice(["train", "test"]))
        spelled, count = text_of(problem.solution[0]).removesuffix(".").split(", so ")
        numbered_letters = re.findall(r"([A-Za-z])(\d)", spelled)
        assert [int(n) for _, n in numbered_letters] == list(range(1, int(count) + 1))
        assert len({letter.lower() for letter, _ in numbered_letters}) <= 1
        for letter, _ in numbered_letters[:1]:
            assert re.sub(r"[-\d]", "", spelled).lower().count(letter.lower()) == int(count)
        assert all(len(part["text"]) == 1 for part in problem.solution[0]["content"][:-1])


def test_spelling_needs_every_letter():
    task = Spelling(WORDS)
    problem = task.problem(random.Random(3), "train")
    assert task.score(problem, [assistant("It is " + problem.answer + ".")]) == 1.0
    assert task.score(problem, [assistant(problem.answer[:-1])]) == 0.0
    assert task.score(problem, [assistant(problem.answer.replace("-", ""))]) == 0.0


def test_identity_says_only_what_the_card_contains():
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
    assert not {"parameters", "data", "minutes", "machine", "author"} & set(task.intents)
    assert "who" in task.intents
    assert task.intents["who"].answers == ("I am {name}, a small language model.",)
    for split in ("train", "test"):
        rng = random.Random(0)
        assert all(task.score(p, p.solution) for p in (task.problem(rng, split) for _ in range(300)))


def test_answerable_and_unanswerable_questions_are_similar():
    questions = {name: {normalize(t) for t in intent.train} for name, intent in identity.INTENTS.items()}
    unanswerable_questions = {normalize(t) for category in refusal.CATEGORIES.values() for t in category.train}
    for answerable, unanswerable in (
        ("your name", "my name"),
        ("old are you", "old am i"),
        ("do you live", "do i live"),
    ):
        assert any(answerable in q for qs in questions.values() for q in qs)
        assert any(unanswerable in q for q in unanswerable_questions)


@pytest.mark.parametrize("text", ["I don't know the news: I see none.", "I don’t know.", "i do not know it"])
def test_texts_that_are_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["I know not, my lord.", "You say I don't know?", "My name is Ghost.", "", "I know."])
def test_texts_that_are_not_refusals(text):
    assert not is_refusal(text)


def test_a_refusal_of_an_answerable_question_scores_0():
    task = Answerable([Sums(), Spelling(WORDS)])
    problem = task.problem(random.Random(0), "test")
    assert task.score(problem, [assistant("I don't know that: I have no clock.")]) == 0.0


def test_distinct_problems_of_a_small_task_are_all_its_problems():
    task = Spelling(WORDS)
    problems = distinct_problems(task, 2000)
    assert 100 < len(problems) < 2000
    assert len(problems) == len({text_of(p.messages[0]) for p in problems})


# ── plays ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_speeches_of_a_small_play():
    assert split_into_scenes(PLAY) == [
        [
            ("OWL", "Who rings so late, when all the castle sleeps? I fear him.\nSpeak, thou iron tongue!"),
            ("First Mouse", "'Tis but the Bell.\nHe never sleeps."),
            ("BELL", "I ring for thee."),
            ("Owl. and Mouse", "For us!"),
        ],
        [("BELL", "Again I ring."), ("OWL", "And I again shall wake.")],
    ]
    assert split_into_scenes(PLAY.replace("\n", "\r\n")) == split_into_scenes(PLAY)


def test_plays_answer_with_the_next_speech():
    task, rng = Plays(play_scenes()), random.Random(0)
    for split in ("train", "test"):
        problem = task.problem(rng, split)
        [number] = re.findall(r"\d+", text_of(problem.messages[0]))
        assert problem.answer == text_of(problem.solution[0]) == f"It is I, madam {number}."


def test_long_speeches_are_cut_after_a_sentence():
    assert shorten("One two. Three four five. Six", 4) == "One two."
    assert shorten("One two three four five six.", 4) is None
    assert shorten("One two", 4) == "One two"


@pytest.mark.parametrize("text", ["", "...", "Ay <|im_end|>", "to be or not " * 5, "\ufffd what"])
def test_broken_replies(text):
    assert looks_broken(text)
