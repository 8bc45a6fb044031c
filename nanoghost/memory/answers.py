"""Greedy answers to many questions at once, and how they are scored."""

from collections.abc import Iterable
from pathlib import Path

from nanoghost.engine.engine import Engine, open_engine
from nanoghost.engine.sampler import SamplingParams
from nanoghost.home import ModelFolder
from nanoghost.memory.phrasings import other_values
from nanoghost.memory.router import Router
from nanoghost.memory.synthesize import SyntheticQA
from nanoghost.tokenizer.chat_format import render
from nanoghost.tools.text_forms import fold, whole_word

ANSWER_TOKENS = 48  # maximum length of an answer


class RoutedModel:
    """A base model and optionally an adapter, with the router that decides which of them answers a question."""

    def __init__(self, base: ModelFolder, adapter: Path | None, router: Router | None):
        """`router`: None if the adapter answers every question."""
        self.engine = open_engine(base, slots=32, slot_tokens=1024, adapter=adapter)
        self.router = router if adapter else None

    def answer(
        self, questions: list[str], contexts: list[str] | None = None, max_tokens: int = ANSWER_TOKENS
    ) -> list[str]:
        """`contexts`: facts to show in the system message, one text for each question.

        Questions that the router sends to the base model are asked without facts.
        """
        conversations, adapters = [], []
        for question, context in zip(questions, contexts or [""] * len(questions)):
            qa = SyntheticQA("question", question, context=context)
            personal = self.router is None or self.router.is_personal(qa.messages(with_context=False))
            conversations.append(qa.messages(with_context=personal))
            adapters.append(self.engine.adapter if personal else "")
        return greedy_answers(self.engine, conversations, max_tokens, adapters)


def greedy_answers(
    engine: Engine, conversations: list[list[dict]], max_tokens: int, adapters: list[str] | None = None
) -> list[str]:
    """The greedy answer to each conversation, all in one batch.

    `adapters`: the adapter for each conversation, "" for the base model; default: the engine's.
    """
    sampling = SamplingParams(max_tokens, temperature=0.0)
    sequences = []
    for messages, adapter in zip(conversations, adapters or [None] * len(conversations)):
        prompt, _ = render(messages, engine.tokenizer, add_generation_prompt=True)
        sequences += engine.add(prompt, sampling, adapter=adapter)
    while not all(sequence.finish_reason for sequence in sequences):
        engine.step()
    return [sequence.messages[-1]["content"] for sequence in sequences]


# -- scoring ----------------------------------------------------------------------------------------------------------


def contains_values(answer: str, values: Iterable[str]) -> bool:
    """Whether an answer contains all values, each as a whole word ("4" is not in "42")."""
    folded = fold(answer)
    return all(whole_word(value).search(folded) for value in values)


def is_correct(answer: str, relation: str, value: str) -> bool:
    """Whether an answer contains the value and no other value that the relation could have."""
    others = other_values(relation, value)
    return contains_values(answer, [value]) and not any(contains_values(answer, [other]) for other in others)


def is_refusal(answer: str) -> bool:
    """Whether an answer says that the user has not told this, which is correct for unanswerable questions only."""
    return "haven't told" in answer or "have not told" in answer
