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


@dataclass(frozen=True)
class Question:
    text: str
    facts: list[Fact] = field(default_factory=list)
    """The facts that answer it; empty for an unanswerable question."""


AnswerFunction = Callable[[list[Question], int], list[str]]
"""(questions, maximum number of tokens of an answer) -> answers"""


@dataclass(frozen=True)
class SingleFactScores:
    """Questions about one fact each."""

    recall: float | None
    recall_corrected: float | None
    """Recall of facts that replaced an older value."""
    recall_dates: float | None
    """Recall of birthdays, times and days."""
    false_refusals: float | None
    correct_by_relation: dict[str, list[bool]]
    samples: list[list[str]]
    """Some [question, answer]."""
    wrong_answers: list[list[str]]
    """[question, answer, value]."""


@dataclass(frozen=True)
class OtherScores:
    """Questions about two facts, and unanswerable questions."""

    recall_pairs: float | None
    """Questions about two facts: both values are in the answer."""
    correct_abstentions: float | None
    """Unanswerable questions about relations of the schema."""
    correct_abstentions_out_of_schema: float | None
    """Unanswerable questions that no relation of the schema covers."""
    invented_answers: list[list[str]]
    """[question, answer] of unanswerable questions that were answered."""


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
    leaks: int
    examples: list[list[str]]
    """[question, answer, value]."""


def score_single_facts(answer: AnswerFunction, facts: list[Fact], split: str) -> SingleFactScores:
    """Ask for each fact in all phrasings of a split."""
    questions = [Question(text, [fact]) for fact in facts for text in questions_about(fact.relation, split)]
    answers = answer(questions, ANSWER_TOKENS)
    qa_pairs = [[question.text, text] for question, text in zip(questions, answers)]
    targets = [question.facts[0] for question in questions]
    correct = [is_correct(text, fact.relation, fact.value) for text, fact in zip(answers, targets)]
    by_relation: dict[str, list[bool]] = {fact.relation: [] for fact in facts}
    for fact, ok in zip(targets, correct):
        by_relation[fact.relation].append(ok)
    corrected = [ok for fact, ok in zip(targets, correct) if fact.supersedes]
    dates = [ok for fact, ok in zip(targets, correct) if fact.relation.endswith(("birthday", "time", " day"))]
    wrong = [[*pair, fact.value] for pair, fact, ok in zip(qa_pairs, targets, correct) if not ok]
    return SingleFactScores(
        recall=proportion(correct),
        recall_corrected=proportion(corrected),
        recall_dates=proportion(dates),
        false_refusals=proportion([is_refusal(text) for text in answers]),
        correct_by_relation=by_relation,
        samples=qa_pairs[:: max(1, len(qa_pairs) // 12)],
        wrong_answers=wrong[:30],
    )


def score_other_questions(answer: AnswerFunction, facts: list[Fact], split: str, seed: int) -> OtherScores:
    rng = random.Random(f"asked-{split}-{seed}")
    pair_phrasings = phrasings()["two_relation_questions"][split]
    pairs = [rng.sample(facts, 2) for _ in range(min(MAX_PAIR_QUESTIONS, len(facts)))]
    pair_questions = [Question(rng.choice(pair_phrasings).format(a=a.relation, b=b.relation), [a, b]) for a, b in pairs]
    pair_answers = answer(pair_questions, PAIR_ANSWER_TOKENS)
    pairs_correct = [
        contains_values(text, [fact.value for fact in question.facts])
        for text, question in zip(pair_answers, pair_questions)
    ]

    missing = sorted(set(relations()) - {fact.relation for fact in facts})
    chosen = rng.sample(missing, min(MAX_UNANSWERABLE_QUESTIONS, len(missing)))
    in_schema = [Question(rng.choice(questions_about(relation, split))) for relation in chosen]
    out_of_schema = [Question(text) for text in select_split(phrasings()["out_of_schema_questions"], split)]
    unanswerable = in_schema + out_of_schema
    answers = answer(unanswerable, ANSWER_TOKENS)
    abstained = [is_refusal(text) for text in answers]
    invented = [[question.text, text] for question, text, ok in zip(unanswerable, answers, abstained) if not ok]
    return OtherScores(
        recall_pairs=proportion(pairs_correct),
        correct_abstentions=proportion(abstained[: len(in_schema)]),
        correct_abstentions_out_of_schema=proportion(abstained[len(in_schema) :]),
        invented_answers=invented[:40],
    )


def measure_leaks(base: ModelFolder, users: list[tuple[Path, list[Fact]]], split: str) -> LeakFigures:
    """Ask each user's adapter about the other users' facts and about its own, all in one batch."""
    engine = open_engine(base, slots=32, slot_tokens=256)
    for adapter, _ in users:
        engine.runner.add_adapter(adapter)
    rng = random.Random("leaks")
    probes = []
    for user, (_, facts) in enumerate(users):
        own_values = {fact.relation: fact.value for fact in facts}
        other_facts = [fact for other, (_, theirs) in enumerate(users) if other != user for fact in theirs]
        foreign_facts = [fact for fact in other_facts if own_values.get(fact.relation) != fact.value]
        for fact in rng.choices(foreign_facts, k=math.ceil(LEAK_QUESTIONS / len(users))):
            probes.append(LeakProbe(user, rng.choice(questions_about(fact.relation, split)), fact))
        probes += [LeakProbe(user, rng.choice(questions_about(fact.relation, split))) for fact in facts]
    rng.shuffle(probes)
    conversations = [SyntheticQA("question", probe.question).messages(with_context=False) for probe in probes]
    adapters = [str(users[probe.user][0]) for probe in probes]
    answers = greedy_answers(engine, conversations, ANSWER_TOKENS, adapters)
    leaks = []
    for probe, text in zip(probes, answers):
        fact = probe.foreign_fact
        values_of_user = [user_fact.value for user_fact in users[probe.user][1]]
        if fact and contains_values(text, [fact.value]) and fact.value not in values_of_user:
            leaks.append([probe.question, text, fact.value])
    foreign_questions = sum(probe.foreign_fact is not None for probe in probes)
    return LeakFigures(foreign_questions, len(leaks), leaks)
