"""Who answers: questions about one's own life go to the adapter, everything else stays the base model's, to the letter."""

import random

import pytest
import torch

from nanoghost.formats.model_folder import load_model
from nanoghost.formats.peft import save_adapter
from nanoghost.home import ModelFolder, write_json
from nanoghost.memory import router, synthesize, train_adapter
from nanoghost.memory.phrases import book, part, relations
from nanoghost.memory.router import Router
from nanoghost.model.lora import new_adapter


@pytest.fixture(scope="module")
def taught():
    return router.fit(*router.lessons())


def said(*texts):
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def share(taught, texts) -> float:
    texts = list(texts)
    return sum(taught.concerns(said(text)) for text in texts) / len(texts)


def test_it_knows_personal_questions_in_wordings_that_it_was_not_taught(taught):
    assert share(taught, (q for relation in relations().values() for q in relation.asked["val"])) >= 0.98
    assert share(taught, part(book()["unheard"], "val")) >= 0.94
    assert share(taught, (way.format(a="uncle's job", b="dog's name") for way in book()["combined"]["val"])) == 1


def test_it_leaves_everybodys_questions_alone(taught):
    assert share(taught, book()["everyday"]["val"]) <= 0.05
    rng = random.Random(0)
    assert share(taught, (synthesize.a_sum(rng) for _ in range(300))) == 0
    others = (
        "Write a poem about the sea.",
        "def fib(n):",
        "Translate 'good morning' into Italian.",
        "",
        "?!",
        "How far is the moon?",
    )
    assert share(taught, others) == 0


def test_what_refers_to_a_personal_question_is_one(taught):
    personal_chat, other = "What is my aunt's job?", "What is the capital of Peru?"
    assert taught.concerns(said(personal_chat, "She is a baker.", "And where does she live?"))
    assert not taught.concerns(said(other, "Lima.", "How many people live there?"))
    assert not taught.concerns(said(personal_chat, "She is a baker.", other))


def test_teaching_is_repeatable_and_numbers_are_all_alike():
    texts = ["What is my name?", "Who am I?"], ["What is 3 + 4?", "Who was Caesar?"]
    assert router.fit(*texts) == router.fit(*texts)
    assert router.grams("What is 12 + 9?") == router.grams("what is 3 + 4")


@pytest.fixture
def slept(base, me, monkeypatch):
    """The toy Llama, and a person with an adapter for it."""
    model, _ = load_model(base, torch.float32)
    adapter = new_adapter(model, 4, None, None, 1)
    for t in adapter.tensors():
        t.data.normal_(0, 0.3)
    save_adapter(me.path / "adapter", adapter)
    card = {
        "stage": "adopt",
        "arch": "llama",
        "parent": None,
        "data": [{"name": "toy"}],
        "parameters": 1,
        "name": "toy",
        "finished": 1.0,
    }
    write_json(base / "card.json", card)
    write_json(me.path / "adapter" / "made_from.json", {"base": ["toy", 1.0], "rows": []})
    simple = Router({"my": 9.0}, -5.0)
    monkeypatch.setattr(train_adapter, "router", lambda: simple)
    return ModelFolder("toy")


def test_answers_about_others_are_the_base_models_and_see_no_notes(slept, me):
    questions, notes = ["What is my name?", "Who is king?"], ["The user is Ines.", "The user is Ines."]
    plain, adapted, routed = (
        train_adapter.Answers(slept, *with_it) for with_it in ((None,), (me.adapter, True), (me.adapter,))
    )
    assert routed(questions) == [adapted(questions)[0], plain(questions)[1]] != adapted(questions)
    assert routed(questions, notes) == [adapted(questions, notes)[0], plain(questions)[1]]


def test_a_conversation_changes_who_answers_from_turn_to_turn(slept, me, monkeypatch):
    from nanoghost.engine.sampler import Sampling
    from nanoghost.serve import personal_chat
    from nanoghost.serve.terminal import Conversation

    monkeypatch.setattr(personal_chat, "router", train_adapter.router)
    greedy = Sampling(max_tokens=8, temperature=0.0)

    def answers(conversation, *questions):
        for question in questions:
            conversation.ask(question)
            list(conversation.answer())
        return [m["content"] for m in conversation.messages if m["role"] == "assistant"]

    mine = answers(
        personal_chat.PersonalConversation("me", False, "toy", greedy, None), "Who is king?", "What is my name?"
    )
    plain = answers(Conversation("toy", greedy, None), "Who is king?", "What is my name?")
    assert mine[0] == plain[0] and mine[1] != plain[1]
    assert [e["text"] for e in me.journal if e["speaker"] == "user"] == ["Who is king?", "What is my name?"]
