"""`nanoghost lab sleep` and `nanoghost lab extraction`: figures from given answers, and a run of toy size."""

import json

import pytest

from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder
from nanoghost.lab import sleep, sleep_scores
from nanoghost.lab.fact_extraction import ExtractedMessage, measure
from nanoghost.lab.sleep import ARMS, facts_in_context, retention_since
from nanoghost.lab.sleep_scores import Question
from nanoghost.memory.router import Router
from tests.support.people import make_fact


def test_extraction_figures_count_facts_and_values():
    group = [
        ExtractedMessage("", [("dog's name", "Rex"), ("town", "Porto")], [("Dog's name", "rex"), ("city", "Porto")]),
        ExtractedMessage("", [("car", "a van"), ("job", "a vet")], []),
    ]
    figures = measure("two or three facts", group)
    assert figures.count == 2
    assert figures.recall == 1 / 4
    assert figures.value_recall == 2 / 4
    assert figures.precision == 1 / 2
    assert figures.empty_messages_correct is None


def test_extraction_figures_of_messages_without_facts():
    figures = measure("no fact", [ExtractedMessage("", [], []), ExtractedMessage("", [], [("town", "Porto")])])
    assert figures.empty_messages_correct == 1 / 2
    assert figures.recall is None


@pytest.mark.parametrize(
    "arm, context",
    [
        ("base", ""),
        ("all-facts", "The user's dog's name is Rex. The user's town is Porto."),
        ("oracle", "The user's dog's name is Rex."),
        ("search", "The user's town is Porto."),
    ],
)
def test_the_facts_in_the_system_message_depend_on_the_arm(arm, context):
    """The words of the question are in the other fact, so that the search and the oracle differ."""
    rex, porto = make_fact(1, "dog's name", "Rex"), make_fact(2, "town", "Porto")
    assert facts_in_context(ARMS[arm], Question("Porto?", [rex]), [rex, porto]) == context


def test_retention_compares_correct_answers_about_the_first_day():
    first_night = {"correct_by_relation": {"car": [True, True], "town": [True, False]}}
    now = {"correct_by_relation": {"car": [True, False], "town": [True, False], "job": [True, True]}}
    assert retention_since(first_night, now) == round(2 / 3, 4)


def test_arms_are_compared_on_the_same_questions(base, nanoghost, monkeypatch):
    monkeypatch.setattr(sleep, "load_router", lambda: Router({"my": 9.0}, -5.0))
    monkeypatch.setattr(sleep_scores, "select_split", lambda lists, split: lists[split][:5])
    ModelFolder("toy").write_card(ModelCard(name="toy", stage="adopt", arch="llama", finished=1.0))
    arguments = ["--facts", 2, "--seeds", 0, "--arms", "base,oracle", "--no-general", "--json"]
    code, output, errors = nanoghost("lab", "sleep", "toy", *arguments)
    assert code == 0, errors
    arms = json.loads(output)["arms"]
    questions = [[question for question, _ in arms[arm][0]["samples"]] for arm in ("base", "oracle")]
    assert questions[0] == questions[1]
    assert arms["base"][0]["recall"] == 0


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--arms", "base,nothing"], "unknown arm 'nothing'"),
        (["--split", "train"], "--split must be val or test"),
        (["--facts-from", "memory"], "--facts-from must be truth or extraction"),
    ],
)
def test_invalid_settings_are_refused(nanoghost, arguments, error):
    code, _, errors = nanoghost("lab", "sleep", *arguments)
    assert code == 2
    assert error in errors
