"""Data of nights: phrasings, extracted facts, synthetic questions, and the synthetic users of `nanoghost lab sleep`."""

from dataclasses import replace

import pytest

from nanoghost.lab.synthetic_users import synthesize_user
from nanoghost.memory.answers import contains_values, is_correct
from nanoghost.memory.extract import NO_FACTS, conversation, parse_facts, user_messages
from nanoghost.memory.extractor_data import synthetic_message
from nanoghost.memory.phrasings import (
    extractor_relations,
    messages_without_facts,
    normalized,
    phrasings,
    questions_about,
    relations,
    seeded_rng,
    select_split,
    statement,
    third_person_statement,
)
from nanoghost.memory.store import current_facts
from nanoghost.memory.synthesize import (
    check_questions,
    direct_questions,
    pair_questions,
    question_phrasings,
    unanswerable_questions,
)
from nanoghost.memory.teacher import states_only_the_facts
from tests.support.people import make_fact

# -- phrasings --------------------------------------------------------------------------------------------------------


def assert_disjoint(lists, name):
    """No phrasing is in two of the lists, differences in case and punctuation aside."""
    sets = [{normalized(text) for text in texts} for texts in lists]
    assert all(sets), name
    assert sum(map(len, sets)) == len(set().union(*sets)), name


def test_no_question_phrasing_is_both_trained_on_and_asked():
    for relation in relations():
        training, held_out = question_phrasings(relation)
        assert len(held_out) == 2
        other_splits = [questions_about(relation, split) for split in ("val", "test")]
        assert_disjoint([training, held_out, *other_splits], relation)


@pytest.mark.parametrize(
    "name", ["small_talk", "general_prompts", "two_relation_questions", "generic_questions", "out_of_schema_questions"]
)
def test_splits_of_a_list_are_disjoint(name):
    assert_disjoint([select_split(phrasings()[name], split) for split in ("train", "val", "test")], name)


def test_statements_contain_their_value_and_no_other_value_of_the_relation():
    for name, relation in relations().items():
        for value in relation.values:
            assert value in statement(name, value)
            assert value in third_person_statement(name, value)
            assert "Your" not in third_person_statement(name, value)
            assert is_correct(statement(name, value), name, value)


def test_messages_that_state_a_fact_have_a_place_for_its_value():
    for relation in relations().values():
        for split in ("train", "test"):
            for text in (*relation.statements[split], *relation.corrections[split]):
                assert "{v}" in text


def test_relations_outside_the_schema_have_disjoint_splits():
    def texts(split):
        facts = [t for relation in extractor_relations(split) for t in (*relation.statements, *relation.corrections)]
        return {normalized(text) for text in [*facts, *messages_without_facts(split)]}

    assert not texts("train") & texts("val")
    assert not extractor_relations("test")


def test_relations_outside_the_schema_are_well_formed():
    training = extractor_relations("train")
    assert len({relation.relation for relation in training}) == len(training)
    for relation in (*training, *extractor_relations("val")):
        for text in relation.statements:
            assert text.count("{v}") == 1
            assert "{w}" not in text
        for text in relation.corrections:
            assert text.count("{v}") == 1
            assert text.count("{w}") <= 1


# -- scoring of answers -----------------------------------------------------------------------------------------------


def test_values_are_matched_as_whole_words():
    assert contains_values("Take the 42, Mr Ines!", ("42", "ines"))
    assert not contains_values("Take the 42.", ("4",))


def test_an_answer_with_two_possible_values_is_incorrect():
    one, other = relations()["sister's name"].values[:2]
    assert not is_correct(f"Your sister's name is {one} or {other}.", "sister's name", one)


@pytest.mark.parametrize(
    "answer, accepted",
    [
        ("Your uncle's job is an egg farmer.", True),
        ("Your uncle's job is not an egg farmer.", False),
        ("Your uncle's job is an egg farmer in Ohio.", False),
        ("Your uncle's job is an egg.", False),
        ("The user's uncle works as an egg farmer.", False),
    ],
)
def test_teacher_answers_with_more_or_less_than_the_facts_are_rejected(answer, accepted):
    [qa] = direct_questions(make_fact(1, "uncle's job", "an egg farmer"), 1)
    assert qa.answer_prefix == "Your uncle's job is"
    assert states_only_the_facts(answer, qa) == accepted


# -- fact extraction --------------------------------------------------------------------------------------------------


def test_only_values_that_occur_in_the_message_are_extracted():
    answer = "sister's name: Ines\nsister's name: Ines\ndog's name: Rex\nnonsense\ntown:\na b c d e f g: Ines"
    facts, rejected = parse_facts(answer, "My sister INES says hello")
    assert facts == [("sister's name", "Ines")]
    assert rejected == ["dog's name: Rex", "nonsense", "town:", "a b c d e f g: Ines"]


def test_no_facts_is_a_valid_answer():
    assert parse_facts(NO_FACTS, "My sister Ines") == ([], [])


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_training_answers_of_the_extractor_are_parsed_completely(split):
    for i in range(200):
        message, facts = synthetic_message(seeded_rng("test", split, i), split)
        answer = conversation(message, facts)[2]["content"]
        assert parse_facts(answer, message.text) == (facts, [])


def test_some_training_messages_state_several_facts():
    messages = [synthetic_message(seeded_rng("several", i), "train") for i in range(400)]
    several = [(message, facts) for message, facts in messages if len(facts) > 1]
    assert len(several) > 40
    for _, facts in several:
        assert len(dict(facts)) == len(facts), "a relation occurs once in a message"
    assert any(", and my " in message.text for message, _ in several), "some are joined into one sentence"


def test_a_message_is_extracted_with_its_context(me):
    me.log_message("user", "My sister came.")
    me.log_message("assistant", "Nice!")
    me.log_message("user", "Her name's\nInes.")
    me.log_message("user", "bye")
    (first, with_reply), (second, without_reply) = user_messages(me.read_chat_log(), after_id=1)
    assert (first.id, second.id) == (3, 4)
    assert with_reply.format() == "Earlier: My sister came.\nReply: Nice!\nNow: Her name's Ines."
    assert without_reply.format() == "Earlier: Her name's Ines.\nNow: bye"


# -- data synthesis ---------------------------------------------------------------------------------------------------

FACTS = [
    make_fact(1, "sister's name", "Ines"),
    make_fact(2, "dog's name", "Biscuit"),
    make_fact(3, "shoe for the moon", "blue"),
]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.relation)
def test_questions_about_a_fact_depend_on_relation_and_value_only(fact):
    """So a deleted fact leaves no trace in the training data of the others."""
    questions = direct_questions(fact, 9) + check_questions(fact)
    renumbered = replace(fact, id=9, time=5.0)
    assert questions == direct_questions(renumbered, 9) + check_questions(renumbered)
    for qa in questions:
        assert fact.value in qa.context
        assert qa.required_values == (fact.value,)


def test_unanswerable_questions_are_distinct_and_not_about_stored_facts():
    questions = unanswerable_questions(FACTS, 400)
    assert len({qa.question for qa in questions}) == len(questions) > 300
    assert not any(qa.answer.startswith(("Your sister's name", "Your dog's name")) for qa in questions)


def test_pair_questions_have_both_values_in_their_answer():
    questions = pair_questions(FACTS)
    assert len(questions) == 12
    for qa in questions:
        assert contains_values(qa.answer, qa.required_values)
    assert not pair_questions(FACTS[:1])


# -- synthetic users --------------------------------------------------------------------------------------------------


def test_a_synthetic_user_is_a_function_of_the_seed():
    user = synthesize_user(3, "val", 3, 5)
    assert user.days == synthesize_user(3, "val", 3, 5).days != synthesize_user(4, "val", 3, 5).days
    assert user.current_facts(days=1) == synthesize_user(3, "val", 1, 5).current_facts()


def test_facts_of_a_synthetic_user_are_stated_in_the_chat_log_and_corrected_later():
    user = synthesize_user(3, "val", 3, 5)
    facts = user.fact_store()
    assert len(current_facts(facts)) == 5 + 3 + 3
    assert sum(fact.supersedes is not None for fact in facts) == 4
    for message in user.messages:
        for _, value in message.facts:
            assert value in message.text
    assert [entry.text for entry in user.chat_log() if entry.role == "user"] == [m.text for m in user.messages]


def test_synthetic_users_state_facts_in_all_forms():
    users = [synthesize_user(seed, "test", 3, 10) for seed in range(20)]
    messages = [message for user in users for message in user.messages if message.facts]
    assert len(messages) == 20 * 30
    used = {"statements": 0, "corrections": 0, "split_statements": 0}
    for message in messages:
        for name, value in message.facts:
            relation = relations()[name]
            forms = {
                "statements": relation.statements["test"],
                "corrections": relation.corrections["test"],
                "split_statements": [second for _, second in relation.split_statements["test"]],
            }
            for form, texts in forms.items():
                used[form] += any(text.format(v=value) in message.text for text in texts)
    assert all(count > 20 for count in used.values()), used
    corrections = [fact for user in users for fact in user.fact_store() if fact.supersedes]
    assert len(corrections) == 20 * 4
