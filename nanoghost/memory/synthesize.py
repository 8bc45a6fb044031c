"""Data synthesis: the stored facts become questions in many phrasings, from which the adapter learns.

    direct        asks for one fact
    pair          asks for two facts at once
    check         "Is my sister's name Ines?"; the answer is yes or no
    unanswerable  asks what no stored fact says; the answer abstains

An answer to a direct question begins with the relation in canonical words ("Your sister's name is ..."). So every
phrasing of a question leads to the same few tokens, and what follows them, the value or the abstention, is learned
from all phrasings together.

General prompts, with the base model's own answers, are added to these (teacher.general_examples).
The questions about a fact depend on this fact alone, or on this pair of facts, so a deleted fact leaves no trace.
"""

from dataclasses import dataclass
from itertools import zip_longest
from random import Random

from nanoghost.memory.phrasings import (
    FACTS_PROMPT,
    canonical_statement,
    lowercase_first,
    other_values,
    phrasings,
    questions_about,
    relations,
    seeded_rng,
    select_split,
    specific_questions,
    statement,
    third_person_statement,
)
from nanoghost.memory.store import Fact

DIRECT_QUESTIONS = 1400  # in a night, divided among the facts
MIN_PER_FACT, MAX_PER_FACT = 36, 100  # limits of the direct questions about one fact
HELD_OUT_PHRASINGS = 2  # of each relation, for the acceptance test
PARTNERS_PER_FACT = 3  # other facts that a fact is paired with
PHRASINGS_PER_PAIR = 2
TEMPTING_WEIGHT = 2  # weight of unanswerable questions whose attribute is stored about somebody else
CHECK_QUESTIONS = (
    "Is my {a} {v}?",
    "Did I say that my {a} is {v}?",
    "My {a} is {v}, isn't it?",
    "So my {a} is {v}, right?",
)
ARITHMETIC_TEMPLATES = (
    "What is {} {} {}?",
    "{} {} {} =",
    "Calculate {} {} {}.",
    "How much is {} {} {}?",
    "Give me only the result: {} {} {}",
)


@dataclass(frozen=True)
class SyntheticQA:
    """A question and its answer."""

    kind: str
    """direct, pair, check, unanswerable or general."""
    question: str
    answer: str | None = None
    """None: the teacher has yet to answer."""
    context: str = ""
    """Facts in the teacher's system message. The adapter learns to answer without them."""
    required_values: tuple[str, ...] = ()
    """Values that a correct answer contains."""
    answer_prefix: str = ""
    """How the answer begins."""
    fallback: str = ""
    """Answer for the case that the teacher's is incorrect."""
    from_teacher: bool = False
    """Whether the teacher wrote the answer: only then the adapter learns from the teacher's probabilities."""
    truncated: bool = False
    """Whether the answer hit the token limit."""

    @classmethod
    def from_json(cls, values: dict) -> "SyntheticQA":
        return cls(**values | {"required_values": tuple(values["required_values"])})

    def messages(self, with_context: bool) -> list[dict]:
        """As a conversation; `with_context`: with the facts in the system message."""
        messages = [{"role": "user", "content": self.question}]
        if with_context and self.context:
            messages.insert(0, {"role": "system", "content": FACTS_PROMPT.format(facts=self.context)})
        if self.answer is not None:
            messages.append({"role": "assistant", "content": self.answer})
        return messages


def question_phrasings(relation: str) -> tuple[list[str], list[str]]:
    """Phrasings of a question about a relation: (for training, held out for the acceptance test)."""
    questions = questions_about(relation, "train")
    seeded_rng("wordings", relation).shuffle(questions)
    specific = specific_questions(relation, "train")
    specific_shuffled = [q for q in questions if q in specific]
    generic = [q for q in questions if q not in specific]
    alternating = [q for pair in zip_longest(specific_shuffled, generic) for q in pair if q]
    return alternating[HELD_OUT_PHRASINGS:][:MAX_PER_FACT], alternating[:HELD_OUT_PHRASINGS]


# -- questions about stored facts -------------------------------------------------------------------------------------


def fact_questions(facts: list[Fact]) -> list[SyntheticQA]:
    """Direct and check questions about each fact."""
    per_fact = min(MAX_PER_FACT, max(MIN_PER_FACT, DIRECT_QUESTIONS // max(1, len(facts))))
    examples = []
    for fact in facts:
        examples += direct_questions(fact, per_fact)
        examples += check_questions(fact)
    return examples


def direct_questions(fact: Fact, count: int) -> list[SyntheticQA]:
    """Up to `count` questions that ask for the value. The teacher answers them."""
    training_phrasings, _ = question_phrasings(fact.relation)
    context = third_person_statement(fact.relation, fact.value)
    return [
        SyntheticQA(
            kind="direct",
            question=question,
            context=context,
            required_values=(fact.value,),
            answer_prefix=f"Your {fact.relation} is",
            fallback=canonical_statement(fact.relation, fact.value),
        )
        for question in training_phrasings[:count]
    ]


def check_questions(fact: Fact) -> list[SyntheticQA]:
    """Yes/no questions with the true value and, for a relation of the schema, with other values."""
    relation, value = fact.relation, fact.value
    answer = lowercase_first(statement(relation, value))
    context = third_person_statement(relation, value)
    rng = seeded_rng("check", relation, value)
    others = other_values(relation, value)
    examples = []
    for phrasing in CHECK_QUESTIONS:
        question = phrasing.format(a=relation, v=value)
        examples.append(SyntheticQA("check", question, f"Yes, {answer}", context, (value,)))
        if others:
            question = phrasing.format(a=relation, v=rng.choice(others))
            examples.append(SyntheticQA("check", question, f"No, {answer}", context, (value,)))
    return examples


def pair_questions(facts: list[Fact]) -> list[SyntheticQA]:
    """Questions about two facts. The partners of a fact depend on the two relations alone."""
    examples = []
    for fact in facts:
        others = [other for other in facts if other.relation != fact.relation]
        others.sort(key=lambda other: seeded_rng("pair", fact.relation, other.relation).random())
        for other in others[:PARTNERS_PER_FACT]:
            rng = seeded_rng("pair", fact.relation, other.relation)
            answer = " ".join(canonical_statement(f.relation, f.value) for f in (fact, other))
            context = " ".join(third_person_statement(f.relation, f.value) for f in (fact, other))
            for phrasing in rng.sample(phrasings()["two_relation_questions"]["train"], PHRASINGS_PER_PAIR):
                question = phrasing.format(a=fact.relation, b=other.relation)
                examples.append(SyntheticQA("pair", question, answer, context, (fact.value, other.value)))
    return examples


# -- questions that no stored fact answers ----------------------------------------------------------------------------


def unanswerable_questions(facts: list[Fact], count: int) -> list[SyntheticQA]:
    """About `count` questions about relations of the schema without a fact, and all out-of-schema questions.

    "your uncle's job" is asked more often if "your aunt's job" is stored: there the wrong value is most tempting.
    """
    stored = {fact.relation.casefold() for fact in facts}
    stored_attributes = {attribute_of(relation) for relation in stored} - {""}
    weights = {}
    for relation in relations():
        if relation.casefold() not in stored:
            is_tempting = attribute_of(relation.casefold()) in stored_attributes
            weights[relation] = TEMPTING_WEIGHT if is_tempting else 1
    examples = []
    for relation, weight in weights.items():
        number = max(1, round(count * weight / sum(weights.values())))
        answer = phrasings()["abstentions"]["in_schema"].format(a=relation)
        training_phrasings, _ = question_phrasings(relation)
        for question in seeded_rng("never told", relation).sample(training_phrasings, number):
            examples.append(SyntheticQA("unanswerable", question, answer))
    examples.sort(key=lambda qa: seeded_rng("never told", qa.question).random())
    abstention = phrasings()["abstentions"]["out_of_schema"]
    for question in select_split(phrasings()["out_of_schema_questions"], "train"):
        examples.append(SyntheticQA("unanswerable", question, abstention))
    return examples


def attribute_of(relation: str) -> str:
    """The part of a relation after "'s ": "job" for "uncle's job"; empty if there is none."""
    return relation.partition("'s ")[2]


def arithmetic_prompt(rng: Random) -> str:
    """A small arithmetic problem, as a general prompt."""
    return rng.choice(ARITHMETIC_TEMPLATES).format(rng.randrange(1, 100), rng.choice("+-*"), rng.randrange(1, 20))
