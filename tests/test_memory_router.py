"""The router: questions about one's own life go to the adapter, all others to the base model, unchanged."""

import random

import pytest
import torch

from nanoghost.engine.sampler import SamplingParams
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.peft import save_adapter
from nanoghost.home import ModelFolder
from nanoghost.memory.answers import RoutedModel
from nanoghost.memory.phrasings import phrasings, relations, select_split
from nanoghost.memory.router import Router, train_router, training_messages, word_ngrams
from nanoghost.memory.store import AdapterInputs
from nanoghost.memory.synthesize import arithmetic_prompt
from nanoghost.model.lora import new_adapter
from nanoghost.serve import personal_routing
from nanoghost.serve.conversation import Conversation
from nanoghost.serve.personal_chat import PersonalConversation

# Every message with the word "my" is personal.
SIMPLE_ROUTER = Router({"my": 9.0}, -5.0)


@pytest.fixture(scope="module")
def router():
    return train_router(*training_messages())


def conversation(*texts: str) -> list[dict]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def personal_rate(router: Router, texts) -> float:
    """Proportion of texts that the router takes for personal."""
    decisions = [router.is_personal(conversation(text)) for text in texts]
    return sum(decisions) / len(decisions)


def test_personal_questions_in_other_phrasings_are_recognized(router):
    questions = [question for relation in relations().values() for question in relation.questions["val"]]
    assert personal_rate(router, questions) >= 0.98


def test_out_of_schema_questions_are_recognized(router):
    assert personal_rate(router, select_split(phrasings()["out_of_schema_questions"], "val")) >= 0.94


def test_questions_about_two_facts_are_recognized(router):
    pair_phrasings = phrasings()["two_relation_questions"]["val"]
    assert personal_rate(router, [text.format(a="uncle's job", b="dog's name") for text in pair_phrasings]) == 1


def test_general_prompts_go_to_the_base_model(router):
    assert personal_rate(router, phrasings()["general_prompts"]["val"]) <= 0.05


def test_arithmetic_goes_to_the_base_model(router):
    rng = random.Random(0)
    assert personal_rate(router, [arithmetic_prompt(rng) for _ in range(300)]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "Write a poem about the sea.",
        "def fib(n):",
        "Translate 'good morning' into Italian.",
        "",
        "?!",
        "How far is the moon?",
    ],
)
def test_unusual_general_prompts_go_to_the_base_model(router, text):
    assert not router.is_personal(conversation(text))


def test_pronouns_refer_to_the_message_before(router):
    personal, general = "What is my aunt's job?", "What is the capital of Peru?"
    assert router.is_personal(conversation(personal, "She is a baker.", "And where does she live?"))
    assert not router.is_personal(conversation(general, "Lima.", "How many people live there?"))
    assert not router.is_personal(conversation(personal, "She is a baker.", general))


def test_training_is_repeatable():
    texts = ["What is my name?", "Who am I?"], ["What is 3 + 4?", "Who was Caesar?"]
    assert train_router(*texts) == train_router(*texts)


def test_all_numbers_are_the_same_word():
    assert word_ngrams("What is 12 + 9?") == word_ngrams("what is 3 + 4")


@pytest.fixture
def person_with_adapter(base, me):
    """A person with an adapter of random weights for the toy Llama."""
    model, _ = load_model(base, torch.float32)
    adapter = new_adapter(model, 4, None, None, 1)
    for t in adapter.tensors():
        t.data.normal_(0, 0.3)
    save_adapter(me.path / "adapter", adapter)
    card = ModelCard(name="toy", stage="adopt", arch="llama", data=[{"name": "toy"}], parameters=1, finished=1.0)
    ModelFolder("toy").write_card(card)
    AdapterInputs("toy", 1.0, ()).write(me.path / "adapter")
    return me


def test_general_questions_get_the_base_models_answer_and_see_no_facts(person_with_adapter):
    questions = ["What is my name?", "Who is king?"]
    contexts = ["The user is Ines.", "The user is Ines."]
    toy, adapter = ModelFolder("toy"), person_with_adapter.adapter
    base_alone = RoutedModel(toy, None, None)
    adapter_always = RoutedModel(toy, adapter, None)
    routed = RoutedModel(toy, adapter, SIMPLE_ROUTER)
    base_answers, adapter_answers = base_alone.answer(questions), adapter_always.answer(questions)
    assert routed.answer(questions) == [adapter_answers[0], base_answers[1]] != adapter_answers
    with_context = adapter_always.answer(questions, contexts)
    assert routed.answer(questions, contexts) == [with_context[0], base_answers[1]]


def test_lines_typed_in_a_personal_chat_are_in_the_folder_of_the_person(person_with_adapter, home):
    sampling = SamplingParams(max_tokens=8)
    assert PersonalConversation("me", False, "toy", sampling, None).line_history.parent == person_with_adapter.path
    assert Conversation("toy", sampling, None).line_history.parent == home


def test_a_chat_is_routed_turn_by_turn(person_with_adapter, monkeypatch):
    monkeypatch.setattr(personal_routing, "load_router", lambda: SIMPLE_ROUTER)
    greedy = SamplingParams(max_tokens=8, temperature=0.0)

    def answers(conversation, *questions):
        for question in questions:
            conversation.ask(question)
            list(conversation.answer())
        return [m["content"] for m in conversation.messages if m["role"] == "assistant"]

    questions = ("Who is king?", "What is my name?")
    personal = answers(PersonalConversation("me", False, "toy", greedy, None), *questions)
    plain = answers(Conversation("toy", greedy, None), *questions)
    assert personal[0] == plain[0]
    assert personal[1] != plain[1]
    assert [entry.text for entry in person_with_adapter.read_chat_log() if entry.role == "user"] == list(questions)
