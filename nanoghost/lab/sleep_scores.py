"""Scores of one arm of `nanoghost lab sleep`: answers to questions in phrasings that no night trains on.

An answer is correct if it contains the value and no other value that the relation could have.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nanoghost.engine.engine import open_engine
from nanoghost.home import ModelFolder
from nanoghost.lab.retention import proportion
from nanoghost.memory.answers import ANSWER_TOKENS, contains_values, greedy_answers, is_correct, is_refusal
from nanoghost.memory.phrasings import phrasings, questions_about, relations, select_split
from nanoghost.memory.store import Fact
from nanoghost.memory.synthesize import SyntheticQA

MAX_PAIR_QUESTIONS = 30
PAIR_ANSWER_TOKENS = 64
MAX_UNANSWERABLE_QUESTIONS = 60
LEAK_QUESTIONS = 200  # about other users' facts, at least
DATE_RELATION_ENDINGS = ("birthday", "time", " day")
# Answers that a result contains, at most
SAMPLES = 12
MAX_WRONG_ANSWERS = 30
MAX_INVENTED_ANSWERS = 40


@dataclass(frozen=True)
class Question:
    """A question of a user to the model."""

    text: str
    facts: list[Fact] = field(default_factory=list)
    """The facts that answer it; empty for an unanswerable question."""


AnswerFunction = Callable[[list[Question], int], list[str]]
"""(questions, maximum number of tokens of an answer) -> answers"""


@dataclass(frozen=True)
class SingleFactScores:
    """Scores of questions about one fact each. Fractions are None if there is no such question."""

    recall: float | None
    """Fraction of the questions with a correct answer."""
    recall_corrected: float | None
    """Recall of facts that replaced an older value."""
    recall_dates: float | None
    """Recall of birthdays, times and days."""
    false_refusals: float | None
    """Fraction of the questions that are refused."""
    correct_by_relation: dict[str, list[bool]]
    """For each relation, whether the answer to each question is correct."""
    samples: list[list[str]]
    """About SAMPLES [question, answer], spread over all questions."""
    wrong_answers: list[list[str]]
    """[question, answer, value] of the first incorrect answers."""


@dataclass(frozen=True)
class OtherScores:
    """Scores of questions about two facts, and of unanswerable questions. Fractions are None without such questions."""

    recall_pairs: float | None
    """Fraction of the questions about two facts whose answer contains both values."""
    correct_abstentions: float | None
    """Fraction of the unanswerable questions about relations of the schema that are refused."""
    correct_abstentions_out_of_schema: float | None
    """The same for unanswerable questions that no relation of the schema covers."""
    invented_answers: list[list[str]]
    """[question, answer] of the first unanswerable questions that are answered."""


@dataclass(frozen=True)
class LeakProbe:
    """A question to one user's adapter."""

    user: int
    question: str
    foreign_fact: Fact | None = None
    """The other user's fact that it asks for; None if it asks for a fact of the user's own."""


@dataclass(frozen=True)
class LeakFigures:
    """Questions to one user's adapter about another user's facts."""

    questions: int
    """Number of questions about another user's facts."""
    leaks: int
    """Number of answers that contain the other user's value."""
    examples: list[list[str]]
    """[question, answer, value] of the leaks."""


def score_single_facts(ask: AnswerFunction, facts: list[Fact], split: str) -> SingleFactScores:
    """Ask for each fact in all phrasings of a split."""
    questions = [Question(text, [fact]) for fact in facts for text in questions_about(fact.relation, split)]
    answers = ask(questions, ANSWER_TOKENS)
    qa_pairs = [[question.text, answer] for question, answer in zip(questions, answers)]
    correct, corrected, dates, wrong_answers = [], [], [], []
    by_relation: dict[str, list[bool]] = {fact.relation: [] for fact in facts}
    for question, answer in zip(questions, answers):
        [fact] = question.facts
        ok = is_correct(answer, fact.relation, fact.value)
        correct.append(ok)
        by_relation[fact.relation].append(ok)
        if fact.supersedes:
            corrected.append(ok)
        if fact.relation.endswith(DATE_RELATION_ENDINGS):
            dates.append(ok)
        if not ok:
            wrong_answers.append([question.text, answer, fact.value])
    return SingleFactScores(
        recall=proportion(correct),
        recall_corrected=proportion(corrected),
        recall_dates=proportion(dates),
        false_refusals=proportion([is_refusal(answer) for answer in answers]),
        correct_by_relation=by_relation,
        samples=qa_pairs[:: max(1, len(qa_pairs) // SAMPLES)],
        wrong_answers=wrong_answers[:MAX_WRONG_ANSWERS],
    )


def score_other_questions(ask: AnswerFunction, facts: list[Fact], split: str, seed: int) -> OtherScores:
    """Ask for pairs of facts, and for what no fact says."""
    rng = random.Random(f"asked-{split}-{seed}")
    pair_phrasings = phrasings()["two_relation_questions"][split]
    pairs = [rng.sample(facts, 2) for _ in range(min(MAX_PAIR_QUESTIONS, len(facts)))]
    pair_questions = []
    for a, b in pairs:
        text = rng.choice(pair_phrasings).format(a=a.relation, b=b.relation)
        pair_questions.append(Question(text, [a, b]))
    pairs_correct = []
    for question, answer in zip(pair_questions, ask(pair_questions, PAIR_ANSWER_TOKENS)):
        pairs_correct.append(contains_values(answer, [fact.value for fact in question.facts]))

    missing = sorted(set(relations()) - {fact.relation for fact in facts})
    chosen = rng.sample(missing, min(MAX_UNANSWERABLE_QUESTIONS, len(missing)))
    in_schema = [Question(rng.choice(questions_about(relation, split))) for relation in chosen]
    out_of_schema = [Question(text) for text in select_split(phrasings()["out_of_schema_questions"], split)]
    unanswerable = in_schema + out_of_schema
    refusals, invented_answers = [], []
    for question, answer in zip(unanswerable, ask(unanswerable, ANSWER_TOKENS)):
        refusals.append(is_refusal(answer))
        if not is_refusal(answer):
            invented_answers.append([question.text, answer])
    return OtherScores(
        recall_pairs=proportion(pairs_correct),
        correct_abstentions=proportion(refusals[: len(in_schema)]),
        correct_abstentions_out_of_schema=proportion(refusals[len(in_schema) :]),
        invented_answers=invented_answers[:MAX_INVENTED_ANSWERS],
    )


def measure_leaks(base: ModelFolder, users: list[tuple[Path, list[Fact]]], split: str) -> LeakFigures:
    """Ask each user's adapter about the other users' facts and about its own, all in one batch.

    `users`: (adapter, facts) of each user.
    """
    engine = open_engine(base, slots=32, slot_tokens=256)
    for adapter, _ in users:
        engine.runner.add_adapter(adapter)
    rng = random.Random("leaks")
    probes = []
    for user, (_, facts) in enumerate(users):
        own_values = {fact.relation: fact.value for fact in facts}
        foreign_facts = []
        for other_user, (_, other_facts) in enumerate(users):
            if other_user != user:
                foreign_facts += [fact for fact in other_facts if own_values.get(fact.relation) != fact.value]
        for fact in rng.choices(foreign_facts, k=math.ceil(LEAK_QUESTIONS / len(users))):
            probes.append(LeakProbe(user, rng.choice(questions_about(fact.relation, split)), fact))
        probes += [LeakProbe(user, rng.choice(questions_about(fact.relation, split))) for fact in facts]
    rng.shuffle(probes)
    conversations = [SyntheticQA("question", probe.question).messages(with_context=False) for probe in probes]
    adapters = [str(users[probe.user][0]) for probe in probes]
    answers = greedy_answers(engine, conversations, ANSWER_TOKENS, adapters)
    leaks = []
    for probe, answer in zip(probes, answers):
        fact = probe.foreign_fact
        _, user_facts = users[probe.user]
        user_values = [user_fact.value for user_fact in user_facts]
        if fact and contains_values(answer, [fact.value]) and fact.value not in user_values:
            leaks.append([probe.question, answer, fact.value])
    foreign_questions = sum(probe.foreign_fact is not None for probe in probes)
    return LeakFigures(foreign_questions, len(leaks), leaks)
