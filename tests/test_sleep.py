"""Nights: an adapter is a function of base model, facts and seed, and a deleted fact leaves no trace in it."""

from dataclasses import replace
from html import escape

import pytest
import torch

from nanoghost import hardware
from nanoghost.engine import paged_runner
from nanoghost.engine.engine import open_engine
from nanoghost.errors import StopFlag
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.peft import save_adapter
from nanoghost.home import ModelFolder
from nanoghost.memory import acceptance, night, synthesize, train_adapter
from nanoghost.memory.answers import greedy_answers
from nanoghost.memory.night_record import finished_nights, read_record
from nanoghost.memory.phrasings import phrasings
from nanoghost.memory.recipe import AdapterRecipe
from nanoghost.memory.store import Person, current_facts
from nanoghost.memory.synthesize import SyntheticQA
from nanoghost.memory.teacher import token_targets, tokenize_example
from nanoghost.memory.train_adapter import AdapterRun, train_on_answers
from nanoghost.model.lora import new_adapter
from tests.support.people import QuietDisplay, adapter_bytes, make_fact, memory, toy_night

CARD = ModelCard(name="toy", stage="adopt", arch="llama", finished=1.0)
UNANSWERABLE = SyntheticQA("unanswerable", "who?", "You haven't told me.")

# -- training ---------------------------------------------------------------------------------------------------------


def facts_qa() -> list[SyntheticQA]:
    """Six answers about a fact, every second one written by the teacher, and an abstention."""
    examples = []
    for i in range(6):
        examples.append(
            SyntheticQA(
                kind="direct",
                question="what is it?",
                answer="it is red.",
                context="The user's it is red.",
                required_values=("red",),
                answer_prefix="it" if i % 4 == 2 else "",
                from_teacher=i % 2 == 0,
            )
        )
    return [*examples, UNANSWERABLE]


def general_qa() -> list[SyntheticQA]:
    return [SyntheticQA("general", "hello", "hi", from_teacher=True)]


def train_toy_adapter(base, folder, stop_flag, display):
    ModelFolder("toy").write_card(CARD)
    model, tokenizer = load_model(base, torch.float32)
    recipe = AdapterRecipe(rank=2, context=64)
    general = general_qa(), token_targets(model, tokenizer, general_qa(), recipe)
    run = AdapterRun(ModelFolder("toy"), folder, recipe, stop_flag, display)
    return train_on_answers(run, facts_qa(), general)


class StoppingDisplay(QuietDisplay):
    """Requests a stop at a step."""

    def __init__(self, stop_flag, step: int):
        self.stop_flag, self.step = stop_flag, step

    def show(self, event: dict) -> None:
        self.stop_flag.requested = event["step"] == self.step


def test_stopped_and_resumed_training_gives_byte_identical_adapter(base, me):
    with StopFlag() as stop_flag:
        figures = train_toy_adapter(base, me.path / "one", stop_flag, QuietDisplay())
        with pytest.raises(KeyboardInterrupt):
            train_toy_adapter(base, me.path / "two", stop_flag, StoppingDisplay(stop_flag, figures.steps // 2))
        assert not (me.path / "two" / "adapter").exists()
        stop_flag.requested = False
        train_toy_adapter(base, me.path / "two", stop_flag, QuietDisplay())
    assert adapter_bytes(me.path / "one" / "adapter") == adapter_bytes(me.path / "two" / "adapter")


def test_targets_are_the_teachers_probabilities_where_it_wrote_the_answer(base):
    """The oracle is one plain forward pass of the model over each example, with the facts in the system message."""
    model, tokenizer = load_model(base, torch.float32)
    recipe = AdapterRecipe(context=64)
    examples = [*facts_qa(), *general_qa()]
    for qa, targets in zip(examples, token_targets(model, tokenizer, examples, recipe)):
        example = tokenize_example(qa, tokenizer, with_context=False, max_tokens=64)
        answer_N = torch.tensor([token for token, in_loss in zip(example.ids, example.loss_mask) if in_loss])
        is_answer_NK = targets.ids_NK == answer_N[:, None]
        assert len(answer_N) == len(targets.ids_NK)
        assert is_answer_NK.any(1).all()
        target_probs_N = targets.logprobs_NB.exp()[:, :-1][is_answer_NK]
        if not qa.from_teacher:
            assert (target_probs_N == 1).all()
            continue
        with_context = tokenize_example(qa, tokenizer, with_context=True, max_tokens=128)
        loss_mask = torch.tensor(with_context.loss_mask)
        with torch.no_grad():
            logits = model(torch.tensor(with_context.ids)[None])[0, :-1][loss_mask[1:]]
        teacher_probs_N = torch.softmax(logits, 1).gather(1, answer_N[:, None])[:, 0]
        # Stated facts are sharpened towards the answer's own tokens, and the prefix is certain.
        teacher_weight_N = torch.full_like(teacher_probs_N, recipe.teacher_weight if qa.required_values else 1.0)
        teacher_weight_N[: len(tokenizer.encode(qa.answer_prefix))] = 0.0
        expected_N = teacher_weight_N * teacher_probs_N + 1 - teacher_weight_N
        torch.testing.assert_close(target_probs_N, expected_N, rtol=1e-3, atol=1e-5)


def test_order_of_facts_does_not_change_the_training_data():
    facts = [make_fact(1, "sister's name", "Ines"), make_fact(2, "dog's name", "Biscuit")]
    one, other = (sorted(current_facts(some), key=lambda fact: fact.key) for some in (facts, facts[::-1]))
    assert one == other


# -- whole nights at toy size -----------------------------------------------------------------------------------------

FACT_BY_NAME = {"Ines": ("sister's name", "Ines"), "Rex": ("dog's name", "Rex")}


def extract_names(base, extractor, messages):
    """Fact extraction by hand: a toy model cannot learn it."""
    results = []
    for message in messages:
        facts = [fact for name, fact in FACT_BY_NAME.items() if name in message.text]
        results.append((facts, ["a rejected line"]))
    return results


@pytest.fixture
def toy(base, monkeypatch):
    """Real nights at toy size, except for fact extraction: few questions, and the toy Llama as base model."""
    ModelFolder("toy").write_card(CARD)
    monkeypatch.setattr(night, "open_fact_extractor", lambda *_: None)
    monkeypatch.setattr(night, "extract_facts", extract_names)
    monkeypatch.setattr(night, "GENERATED_GENERAL_PROMPTS", 4)
    monkeypatch.setattr(acceptance, "HELD_OUT_GENERAL_PROMPTS", 4)
    monkeypatch.setattr(synthesize, "MAX_PER_FACT", 10)
    monkeypatch.setattr(synthesize, "MIN_PER_FACT", 4)
    few_prompts = phrasings() | {"general_prompts": {"train": phrasings()["general_prompts"]["train"][:8]}}
    monkeypatch.setattr(acceptance, "phrasings", lambda: few_prompts)
    monkeypatch.setattr(night, "unanswerable_questions", lambda facts, count: [UNANSWERABLE])
    return ModelFolder("toy")


@pytest.fixture
def accept_all(monkeypatch):
    """An acceptance test that every toy passes, whatever it learned."""
    run_test = acceptance.run_acceptance_test

    def perfect_result(*arguments):
        return replace(run_test(*arguments), recall=1.0, kl_nats=0.0, false_refusals=0.0)

    monkeypatch.setattr(night, "run_acceptance_test", perfect_result)
    monkeypatch.setattr(acceptance, "MAX_RECALL_LOSS", 1.0)
    monkeypatch.setattr(acceptance, "MIN_RECALL_GAIN", -1.0)


def test_dry_run_stores_nothing(me, toy):
    me.log_message("user", "My sister is Ines.")
    with StopFlag() as stop_flag:
        assert toy_night(me, toy, stop_flag, dry_run=True) is None
    assert not me.read_facts()
    assert not list(me.path.glob("nights/*"))


def test_night_without_recall_gain_is_rejected_and_changes_nothing(me, toy):
    """A toy learns nothing in six steps."""
    me.log_message("user", "My sister is Ines.")
    with StopFlag() as stop_flag:
        record = toy_night(me, toy, stop_flag)
    assert not record.accepted
    assert record.reasons[0].startswith("recall")
    assert not me.read_facts()
    assert not me.adapter


def test_report_shows_wrong_answers(me, toy):
    me.log_message("user", "My sister is Ines.")
    with StopFlag() as stop_flag:
        record = toy_night(me, toy, stop_flag)
    question, answer = record.after.wrong_answers[0]
    page = (me.path / "nights" / "0001" / "report.html").read_text()
    assert escape(question) in page
    assert escape(answer) in page


def test_rejected_night_is_repeated_with_another_seed(me, toy):
    me.log_message("user", "My sister is Ines.")
    with StopFlag() as stop_flag:
        toy_night(me, toy, stop_flag)
        assert toy_night(me, toy, stop_flag).number == 2
    assert [record.recipe["seed"] for record in finished_nights(me)] == [0, 1]


def test_night_stopped_in_the_acceptance_test_resumes_without_training_again(me, toy, accept_all, monkeypatch):
    me.log_message("user", "My sister is Ines.")
    run_test, train = night.run_acceptance_test, train_adapter.train_adapter
    with StopFlag() as stop_flag:

        def stop(*arguments):
            stop_flag.requested = True
            return run_test(*arguments)

        monkeypatch.setattr(night, "run_acceptance_test", stop)
        with pytest.raises(KeyboardInterrupt):
            toy_night(me, toy, stop_flag)
        assert not me.adapter
        assert not me.read_facts()
        stop_flag.requested = False
        monkeypatch.setattr(night, "run_acceptance_test", run_test)
        monkeypatch.setattr(train_adapter, "train_adapter", None)  # calling it would fail
        assert toy_night(me, toy, stop_flag).accepted
        assert me.adapter
        monkeypatch.setattr(train_adapter, "train_adapter", train)
        me.log_message("user", "My dog is Rex.")
        assert toy_night(me, toy, stop_flag).number == 2


def test_accepted_night_stores_facts_and_adapter(me, toy, accept_all):
    me.log_message("user", "My sister is Ines.")
    with StopFlag() as stop_flag:
        assert toy_night(me, toy, stop_flag).accepted
        assert [fact.value for fact in me.read_facts()] == ["Ines"]
        assert me.adapter_for(toy) == me.adapter
        assert "Your sister&#x27;s name is Ines." in (me.path / "nights" / "0001" / "report.html").read_text()
        assert toy_night(me, toy, stop_flag) is None, "there is nothing new to learn"


def test_night_record_survives_writing_and_reading(me, toy, accept_all):
    me.log_message("user", "My sister is Ines.")
    with StopFlag() as stop_flag:
        record = toy_night(me, toy, stop_flag)
    assert read_record(me.path / "nights" / "0001") == record


def test_adapter_is_not_used_with_another_base_model_of_the_same_name(me, toy, accept_all):
    me.log_message("user", "My sister is Ines.")
    with StopFlag() as stop_flag:
        toy_night(me, toy, stop_flag)
    toy.write_card(replace(toy.card, finished=2.0))
    assert not me.adapter_for(toy)


def mentions_ines(person: Person) -> bool:
    return any("Ines" in path.read_text(errors="replace") for path in person.path.rglob("*") if path.is_file())


def test_deleting_the_only_fact_leaves_no_file_that_mentions_it(me, toy, accept_all):
    me.log_message("user", "My sister is Ines.")
    with StopFlag() as stop_flag:
        toy_night(me, toy, stop_flag)
    assert mentions_ines(me)
    me.delete_fact(1)
    assert not mentions_ines(me)


def test_deleting_a_fact_gives_byte_identical_adapter(me, toy, accept_all):
    """After a deletion the adapter equals, byte for byte, that of a person who never stated the fact.

    Neither the order of the facts nor the number of nights matters, either.
    """
    never_stated, one_night = Person("never").create(), Person("once").create()
    with StopFlag() as stop_flag:
        me.log_message("user", "My sister is Ines.")
        toy_night(me, toy, stop_flag)
        sister_only = adapter_bytes(me.adapter)
        me.log_message("user", "My dog is Rex.")
        toy_night(me, toy, stop_flag)
        both_in_two_nights = adapter_bytes(me.adapter)
        me.delete_fact(1)
        toy_night(me, toy, stop_flag, deleted_facts=1)
        never_stated.log_message("user", "My dog is Rex.")
        toy_night(never_stated, toy, stop_flag)
        one_night.log_message("user", "My dog is Rex. My sister is Ines.")
        toy_night(one_night, toy, stop_flag)
    assert adapter_bytes(me.adapter) == adapter_bytes(never_stated.adapter)
    assert adapter_bytes(one_night.adapter) == both_in_two_nights
    assert len({sister_only, both_in_two_nights, adapter_bytes(me.adapter)}) == 3
    assert [fact.value for fact in me.read_facts()] == ["Rex"]
    assert read_record(me.path / "nights" / "0001").deleted_facts == 1
    assert not mentions_ines(me)


def test_adding_a_fact_by_hand_does_not_hide_earlier_messages(me, toy, accept_all):
    me.log_message("user", "My sister is Ines.")
    memory(me, add=("dog's name", "Rex"))
    with StopFlag() as stop_flag:
        toy_night(me, toy, stop_flag)
        assert sorted((fact.value, fact.sources) for fact in me.read_facts()) == [("Ines", (1,)), ("Rex", (2,))]
        me.delete_fact(2)
        toy_night(me, toy, stop_flag)
    assert [fact.value for fact in me.read_facts()] == ["Rex"]
    assert me.last_processed_id == 1, "messages are processed once"


# -- adapters in the engine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_adapters_of_two_people_in_one_batch_answer_as_each_alone(base, packed, monkeypatch):
    """A sequence's adapter affects no other sequence, and no cached block that sequences with the same prefix share."""
    model, tokenizer = load_model(base, torch.float32)
    if packed and not paged_runner.supports_quantization(model.config):
        pytest.skip("the quantized engine does not run here")
    monkeypatch.setattr(paged_runner, "supports_quantization", lambda config: packed)
    monkeypatch.setattr(hardware, "compute_dtype", lambda: torch.float32)
    folders = []
    for seed in (1, 2):
        adapter = new_adapter(model, 4, None, None, seed)
        for t in adapter.tensors():
            t.data.normal_(0, 0.3)
        folders.append(base.parent / f"toy@{seed}")
        save_adapter(folders[-1], adapter)
    prompts = [[{"role": "user", "content": f"What is my name, {i}?"}] for i in range(6)]
    alone = []
    for folder in [None, *folders]:
        engine = open_engine(ModelFolder("toy"), slots=6, slot_tokens=96, adapter=folder)
        alone.append(greedy_answers(engine, prompts, 12))
    assert alone[0] != alone[1] != alone[2]
    engine = open_engine(ModelFolder("toy"), slots=4, slot_tokens=96, adapter=folders[0])
    engine.runner.add_adapter(folders[1])
    names = ["", str(folders[0]), str(folders[1])]
    combinations = [(prompt, adapter) for prompt in range(6) for adapter in range(3)]
    answers = greedy_answers(
        engine, [prompts[prompt] for prompt, _ in combinations], 12, [names[adapter] for _, adapter in combinations]
    )
    assert answers == [alone[adapter][prompt] for prompt, adapter in combinations]
