"""`nanoghost lab sleep`: what a model remembers after sleep, without the facts in its context, compared with baselines.

Synthetic users (synthetic_users.py) chat with a model for some days. Then they ask about their facts, in phrasings
that no night trains on. The methods to compare are the arms of the experiment. All get the same users and questions:

    base             the base model, which knows no facts: the lower bound
    all-facts        all facts in the system message
    oracle           the facts that answer the question in the system message: the upper bound
    search           the facts that a full-text search finds for the question in the system message
    chat-log-lm      an adapter trained to predict the next token of the chat log
    qa-only          an adapter trained on direct questions with fixed answers: no teacher, no unanswerable questions,
                     no general prompts
    first-night      sleep after the first day, asked only about the facts of that day
    sleep            sleep after all days, with the router: the base model answers general questions
    sleep-unrouted   the same, but the adapter answers every question
    sleep+search     sleep and search together
    after-deletion   sleep after the deletion of three facts, asked only about these

`--split val` is for tuning; `--split test` has other users and phrasings, which nothing was tuned on.
"""

import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.commands.arguments import parse_numbers
from nanoghost.errors import StopFlag, UserError
from nanoghost.home import ModelFolder, home, open_model, read_json, write_json
from nanoghost.lab.fact_extraction import casefold_facts
from nanoghost.lab.retention import measure_general_ability
from nanoghost.lab.sleep_scores import (
    LeakFigures,
    Question,
    measure_leaks,
    score_other_questions,
    score_single_facts,
)
from nanoghost.lab.synthetic_users import SyntheticUser, synthesize_user
from nanoghost.memory.answers import RoutedModel
from nanoghost.memory.extract import extract_facts, open_fact_extractor, user_messages
from nanoghost.memory.night import general_training_examples, synthesize_examples
from nanoghost.memory.phrasings import statement, third_person_statement
from nanoghost.memory.recipe import AdapterRecipe
from nanoghost.memory.router import load_router
from nanoghost.memory.store import Fact, current_facts, search_facts
from nanoghost.memory.synthesize import SyntheticQA, direct_questions
from nanoghost.memory.train_adapter import AdapterRun, train_on_answers
from nanoghost.progress import Display, JsonFlag

DELETED_FACTS = 3  # in the arm after-deletion
CHAT_LOG_EPOCHS = 16  # in the arm chat-log-lm
QUESTIONS_PER_FACT = 44  # in the arm qa-only


@dataclass(frozen=True)
class Arm:
    """A method to compare."""

    adapter: str | None = None
    """Name of the adapter; None: the base model alone."""
    routed: bool = True
    """Whether the router sends general questions to the base model."""
    context: Literal["none", "all", "oracle", "search"] = "none"
    """Which facts are in the system message."""
    general: bool = False
    """Whether general ability is measured."""
    single_facts_only: bool = False
    """Whether the questions about two facts and the unanswerable questions are left out."""


ARMS = {
    "base": Arm(general=True),
    "all-facts": Arm(context="all"),
    "oracle": Arm(context="oracle"),
    "search": Arm(context="search"),
    "chat-log-lm": Arm("chat-log-lm", routed=False, general=True),
    "qa-only": Arm("qa-only", routed=False, general=True),
    "first-night": Arm("first-night", single_facts_only=True),
    "sleep": Arm("sleep", general=True),
    "sleep-unrouted": Arm("sleep", routed=False, general=True),
    "sleep+search": Arm("sleep", context="search"),
    "after-deletion": Arm("after-deletion", single_facts_only=True),
}


@dataclass(frozen=True)
class LabSleepSettings(JsonFlag):
    model: Annotated[str, tyro.conf.Positional] = "smollm2"
    """Base model."""
    nights: int = 1
    """Number of days, each with a night; from the second day on, two facts of a day correct earlier ones."""
    facts: int = 20
    """Facts stated on each day."""
    seeds: str = "0,1,2"
    """Comma-separated seeds; each is a synthetic user."""
    arms: str = ",".join(ARMS)
    """Comma-separated arms to compare."""
    split: str = "val"
    """Users and phrasings of the questions: val or test."""
    facts_from: str = "truth"
    """Where the stored facts come from: truth (as stated) or extraction (by the fact extractor, as in a night)."""
    general: bool = True
    """Also measure general ability: general prompts and knowledge, reasoning-gym, bits per byte."""


@dataclass(frozen=True)
class Trial:
    """The experiment with one synthetic user."""

    settings: LabSleepSettings
    seed: int
    base: ModelFolder
    user: SyntheticUser
    stored_facts: list[Fact]
    """Content of the fact store: the true facts, or the extracted ones."""
    folder: Path
    """Adapters and results."""
    display: Display

    @property
    def true_facts(self) -> list[Fact]:
        """The facts after the last day."""
        return self.user.current_facts()

    def facts_of(self, arm: str) -> tuple[list[Fact], list[Fact]]:
        """(facts that the arm's adapter is trained on, facts that the arm is asked about)"""
        true_facts = self.true_facts
        if arm == "first-night":
            first_day = self.user.current_facts(days=1)
            corrected_later = {fact.relation for fact in true_facts if fact.supersedes}
            return first_day, [fact for fact in first_day if fact.relation not in corrected_later]
        if arm == "after-deletion":
            deleted = random.Random(f"forgotten-{self.seed}").sample(true_facts, DELETED_FACTS)
            deleted_relations = {fact.relation for fact in deleted}
            return [fact for fact in self.stored_facts if fact.relation not in deleted_relations], deleted
        return self.stored_facts, true_facts


def command(settings: LabSleepSettings) -> None:
    hardware.prepare()
    arms = settings.arms.split(",")
    check_settings(settings, arms)
    base, display = open_model(settings.model), Display()
    results: dict[str, list[dict]] = {arm: [] for arm in arms}
    adapters_and_facts = []  # of each user, after sleep
    for seed in parse_numbers("--seeds", settings.seeds, 0):
        user = synthesize_user(seed, settings.split, settings.nights, settings.facts)
        user_name = f"{settings.split}-{seed}-{settings.nights}x{settings.facts}-{settings.facts_from}"
        folder = home() / "lab" / "sleep" / user_name
        stored_facts, extraction = user.current_facts(), {}
        if settings.facts_from == "extraction":
            stored_facts, extraction = extracted_facts(user, base, folder, display)
        trial = Trial(settings, seed, base, user, stored_facts, folder, display)
        for arm in arms:
            path = folder / f"{arm}.json"
            if not path.exists():
                write_json(path, extraction | run_arm(arm, trial))
            result = read_json(path)
            results[arm].append(result)
            display.print(f"seed {seed}, {arm}: recall {result['recall']:.0%}")
        if "sleep" in arms:
            adapters_and_facts.append((folder / "sleep" / "adapter", stored_facts))
    leaks = None
    if len(adapters_and_facts) > 1:
        leaks = measure_leaks(base, adapters_and_facts, settings.split)
    print_table(results, leaks)
    if settings.json:
        print(json.dumps({"arms": results, "leaks": asdict(leaks) if leaks else {}}))


def check_settings(settings: LabSleepSettings, arms: list[str]) -> None:
    unknown = sorted(set(arms) - set(ARMS))
    if unknown:
        raise UserError(f"--arms: unknown arm '{', '.join(unknown)}'; the arms are {', '.join(ARMS)}")
    if settings.split not in ("val", "test"):
        raise UserError(f"--split must be val or test, not '{settings.split}'")
    if settings.facts_from not in ("truth", "extraction"):
        raise UserError(f"--facts-from must be truth or extraction, not '{settings.facts_from}'")


def extracted_facts(
    user: SyntheticUser, base: ModelFolder, folder: Path, display: Display
) -> tuple[list[Fact], dict[str, float]]:
    """(current facts as a night would store them, precision and recall of the extraction)"""
    path = folder / "extracted_facts.json"
    if not path.exists():
        with StopFlag() as stop_flag:
            extractor = open_fact_extractor(base, stop_flag, display)
        messages = [message for _, message in user_messages(user.chat_log(), 0)]
        write_json(path, [facts for facts, _ in extract_facts(base, extractor, messages)])
    facts_of_messages = [list(map(tuple, facts)) for facts in read_json(path)]
    correct = expected_count = extracted_count = 0
    for message, facts in zip(user.messages, facts_of_messages):
        expected, extracted = casefold_facts(message.facts), casefold_facts(facts)
        correct += len(expected & extracted)
        expected_count += len(expected)
        extracted_count += len(extracted)
    figures = {
        "extraction_precision": correct / max(1, extracted_count),
        "extraction_recall": correct / expected_count,
    }
    return sorted(current_facts(user.fact_store(facts_of_messages)), key=lambda fact: fact.key), figures


# -- one arm ----------------------------------------------------------------------------------------------------------


def run_arm(name: str, trial: Trial) -> dict:
    """Train the arm's adapter if necessary, ask the questions, and return all figures."""
    arm, settings = ARMS[name], trial.settings
    training_facts, asked_facts = trial.facts_of(name)
    adapter, figures = None, {}
    if arm.adapter:
        folder = trial.folder / arm.adapter
        figures |= train_arm(arm.adapter, training_facts, trial, folder)
        adapter = folder / "adapter"
    router = load_router() if arm.routed else None
    model = RoutedModel(trial.base, adapter, router)

    def ask(questions: list[Question], max_tokens: int) -> list[str]:
        contexts = [facts_in_context(arm, question, trial.stored_facts) for question in questions]
        return model.answer([question.text for question in questions], contexts, max_tokens)

    figures |= asdict(score_single_facts(ask, asked_facts, settings.split))
    if not arm.single_facts_only:
        figures |= asdict(score_other_questions(ask, trial.true_facts, settings.split, trial.seed))
    if settings.general and arm.general:
        general = measure_general_ability(trial.base, adapter, router, trial.true_facts, settings.split)
        figures |= asdict(general)
    first_night = trial.folder / "first-night.json"
    if name == "sleep" and first_night.exists():
        figures["retained_from_first_night"] = retention_since(read_json(first_night), figures)
    return figures


def train_arm(adapter: str, facts: list[Fact], trial: Trial, folder: Path) -> dict:
    """Train an adapter and save it as folder/adapter, or use the one that is there; returns figures of the training."""
    path = folder / "figures.json"
    if path.exists():
        return read_json(path)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = replace(AdapterRecipe(), seed=trial.seed)
    with StopFlag() as stop_flag:
        run = AdapterRun(trial.base, folder, recipe, stop_flag, trial.display)
        general = ([], [])
        if adapter not in ("chat-log-lm", "qa-only"):
            general = general_training_examples(trial.base, recipe)
        start = time.perf_counter()  # without the general examples, which are computed once for a base model
        if adapter == "chat-log-lm":
            messages = [SyntheticQA("message", "", message.text) for message in trial.user.messages]
            examples = messages * CHAT_LOG_EPOCHS
        elif adapter == "qa-only":
            examples = []
            for fact in facts:
                answer = statement(fact.relation, fact.value)
                examples += [
                    replace(qa, answer=answer, context="") for qa in direct_questions(fact, QUESTIONS_PER_FACT)
                ]
        else:
            examples, synthesis = synthesize_examples(run, facts)
            trial.display.print(
                f"{synthesis.examples} synthetic questions;"
                f" {synthesis.replaced_answers} incorrect answers of the teacher were replaced"
            )
        training = train_on_answers(run, examples, general)
    figures = asdict(training) | {
        "night_seconds": round(time.perf_counter() - start, 1),
        "adapter_megabytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6,
    }
    write_json(path, figures)
    return figures


def facts_in_context(arm: Arm, question: Question, stored_facts: list[Fact]) -> str:
    """The facts in the system message of a question."""
    if arm.context == "none":
        return ""
    if arm.context == "all":
        facts = stored_facts
    elif arm.context == "oracle":
        facts = question.facts
    else:
        facts = search_facts(stored_facts, question.text, max(1, len(question.facts)))
    return " ".join(third_person_statement(fact.relation, fact.value) for fact in facts)


def retention_since(first_night: dict, now: dict) -> float:
    """Number of correct answers about the facts of the first day, as a fraction of that after the first night.

    Both arguments are figures of `run_arm`.
    """
    correct_then = correct_now = 0
    for relation, flags in first_night["correct_by_relation"].items():
        correct_then += sum(flags)
        correct_now += sum(now["correct_by_relation"][relation])
    return round(correct_now / max(1, correct_then), 4)


# -- table ------------------------------------------------------------------------------------------------------------

FIGURES = (  # a row of the table for each
    "recall",
    "recall_pairs",
    "recall_corrected",
    "recall_dates",
    "retained_from_first_night",
    "false_refusals",
    "correct_abstentions",
    "correct_abstentions_out_of_schema",
    "intrusions",
    "general_false_refusals",
    "general_knowledge",
    "reasoning_gym",
    "bits_per_byte",
    "kl_nats",
    "night_seconds",
    "adapter_megabytes",
    "extraction_precision",
    "extraction_recall",
)


def print_table(results: dict[str, list[dict]], leaks: LeakFigures | None) -> None:
    """One column for each arm: mean and standard deviation over the seeds."""
    table = Table("", *results)
    for name, cells in table_rows(results):
        table.add_row(name.replace("_", " "), *cells)
    console = Console(stderr=True)
    console.print(table)
    if leaks:
        console.print(f"facts of other users in answers: {leaks.leaks} of {leaks.questions}")


def table_rows(results: dict[str, list[dict]]) -> Iterator[tuple[str, list[str]]]:
    """(name of a figure, cell of each arm), for the figures that an arm has."""
    for name in FIGURES:
        values_by_arm = []
        for figures_of_seeds in results.values():
            values = [figures.get(name) for figures in figures_of_seeds]
            values_by_arm.append([value for value in values if value is not None])
        if any(values_by_arm):
            yield name, [mean_and_deviation(values) for values in values_by_arm]


def mean_and_deviation(values: list[float]) -> str:
    """Mean and standard deviation as text; empty without values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3g}"
    return f"{mean} ±{statistics.stdev(values):.2g}" if len(values) > 1 else mean
