"""A night: what a person wrote since the last one is trained into the adapter that this person talks to.

    chat log --extract--> facts --synthesize--> questions and answers --train--> adapter --accept--> in use

Every night starts from the base model and uses all facts, so an adapter is a function of base model, facts and seed.
Each step stores its result in the folder of the night: a night that was stopped is resumed by the same command.
"""

import os
import shutil
import time
from dataclasses import asdict, replace

from nanoghost.engine.engine import open_engine
from nanoghost.errors import StopFlag, UserError
from nanoghost.home import ModelFolder, open_model, read_json, write_json
from nanoghost.memory.acceptance import rejection_reasons, run_acceptance_test, training_general_prompts
from nanoghost.memory.extract import extract_facts, open_fact_extractor, unprocessed_messages
from nanoghost.memory.night_record import NightRecord, SynthesisFigures, finished_nights, read_record
from nanoghost.memory.night_report import write_report
from nanoghost.memory.phrasings import normalized, seeded_rng, statement
from nanoghost.memory.recipe import AdapterRecipe
from nanoghost.memory.store import AdapterInputs, Fact, MergedFacts, Person, current_facts, merge_facts
from nanoghost.memory.synthesize import (
    SyntheticQA,
    arithmetic_prompt,
    fact_questions,
    pair_questions,
    unanswerable_questions,
)
from nanoghost.memory.teacher import TokenTargets, answer_questions, general_examples
from nanoghost.memory.train_adapter import AdapterRun, train_on_answers
from nanoghost.progress import Display

MIN_UNANSWERABLE, MAX_UNANSWERABLE = 750, 1200  # between these, half as many as there are questions about facts
GENERATED_GENERAL_PROMPTS = 250  # which the base model generates itself
ARITHMETIC_PROMPT_COUNT = 40
DEFAULT_BASE = "smollm2"


def base_model(person: Person, name: str | None) -> ModelFolder:
    """The base model of the next night: `name`, or that of the last night, or the default."""
    inputs = person.adapter_inputs
    base = open_model(name or (inputs.base if inputs else DEFAULT_BASE))
    if "@" in base.name or base.card.arch == "ghost":
        raise UserError(
            f"'{base.name}' cannot be the base model of a night: choose a Llama model that is not an adapter,"
            f" such as {DEFAULT_BASE}"
        )
    return base


def run_night(
    person: Person,
    base: ModelFolder,
    display: Display,
    stop_flag: StopFlag,
    recipe: AdapterRecipe | None = None,
    deleted_facts: int = 0,
    dry_run: bool = False,
) -> NightRecord | None:
    """Run or resume one night; returns its record, or None if there is nothing to learn or with `dry_run`.

    `deleted_facts`: facts that were deleted since the last night. `dry_run`: extract and show the facts, store nothing.
    """
    run, record = start_night(person, base, display, stop_flag, recipe or AdapterRecipe(), deleted_facts)

    # Facts: extract the new ones, and merge them into the stored ones.
    extract_new_facts(person, run, record)
    merged = merge_facts(person.read_facts(), record.facts_by_entry(person.read_chat_log()))
    if dry_run:
        show_facts(merged, display)
        return None
    facts = sorted(current_facts(merged.facts), key=lambda fact: fact.key)
    inputs = AdapterInputs.of(base, facts)
    if not facts or person.adapter_inputs == inputs:
        display.print(f"there are no {'new ' if facts else ''}facts: there is nothing to learn")
        return None
    record.describe_facts(merged)
    record.write(run.folder)
    if merged.added:
        display.print("extracted facts (after the night, --correct and --forget of `nanoghost memory` change them):")
        show_facts(merged, display)

    # Adapter: synthesize its training data, and train it.
    examples, record.synthesis = synthesize_examples(run, facts)
    stop_flag.check()
    if AdapterInputs.read(run.folder / "adapter") != inputs:
        general = general_training_examples(base, run.recipe)
        record.training = train_on_answers(run, examples, general)
        record.write(run.folder)
        inputs.write(run.folder / "adapter")

    # Decision: compare it with the old adapter, and put it in place if it is better.
    display.print("acceptance test: recall of the stored facts, and unchanged answers to everything else")
    record.before = run_acceptance_test(base, person.adapter_for(base), facts, run.recipe)
    stop_flag.check()
    record.after = run_acceptance_test(base, run.folder / "adapter", facts, run.recipe)
    stop_flag.check()
    record.reasons = rejection_reasons(record.before, record.after, has_new_facts(person, inputs, base))
    record.finished = time.time()
    if record.accepted:
        put_in_place(person, run, merged, record)
    record.write(run.folder)
    report(person, run, record)
    return record


# -- steps ------------------------------------------------------------------------------------------------------------


def start_night(
    person: Person, base: ModelFolder, display: Display, stop_flag: StopFlag, recipe: AdapterRecipe, deleted_facts: int
) -> tuple[AdapterRun, NightRecord]:
    """The folder and the record of the next night, or of the one that was stopped."""
    finished = finished_nights(person)
    number = len(finished) + 1
    folder = person.path / "nights" / f"{number:04}"
    rejected_in_a_row = 0
    for record in reversed(finished):
        if record.accepted:
            break
        rejected_in_a_row += 1
    recipe = replace(recipe, seed=recipe.seed + rejected_in_a_row)  # the same seed would fail again
    record = read_record(folder) or NightRecord(number, deleted_facts)
    record.base, record.recipe = base.name, asdict(recipe)
    return AdapterRun(base, folder, recipe, stop_flag, display), record


def extract_new_facts(person: Person, run: AdapterRun, record: NightRecord) -> None:
    """Extract facts from the messages since the last night into the record, unless a stopped night has done so."""
    unprocessed = unprocessed_messages(person)
    last_entry_id = max((entry.id for entry, _ in unprocessed), default=person.last_processed_id)
    if record.last_entry_id == last_entry_id:
        return
    record.last_entry_id = last_entry_id
    record.extracted, record.rejected_lines = [], []
    if not unprocessed:
        return
    extractor = open_fact_extractor(run.base, run.stop_flag, run.display)
    run.display.print(f"night {record.number}: extracting facts from {len(unprocessed)} messages of {person.name}")
    results = extract_facts(run.base, extractor, [message for _, message in unprocessed])
    for (entry, _), (facts, rejected) in zip(unprocessed, results):
        if facts:
            record.extracted.append((entry.id, facts))
        record.rejected_lines += rejected


def synthesize_examples(run: AdapterRun, facts: list[Fact]) -> tuple[list[SyntheticQA], SynthesisFigures]:
    """All synthetic questions about the facts, with their answers; stored in the folder of the run."""
    path = run.folder / "synthetic_qa.json"
    fact_pairs = [[fact.relation, fact.value] for fact in facts]
    if path.exists():
        stored = read_json(path)
        if stored["facts"] == fact_pairs:
            examples = [SyntheticQA.from_json(values) for values in stored["examples"]]
            return examples, SynthesisFigures(**stored["figures"])
    answerable = fact_questions(facts) + pair_questions(facts)
    count = min(MAX_UNANSWERABLE, max(MIN_UNANSWERABLE, len(answerable) // 2))
    unanswerable = unanswerable_questions(facts, count)
    run.display.print(
        f"data synthesis: {len(answerable)} questions about {len(facts)} facts,"
        f" {len(unanswerable)} unanswerable questions"
    )
    engine = open_engine(run.base, slots=32, slot_tokens=256)
    answered, replaced_answers = answer_questions(
        answerable + unanswerable, engine.runner, engine.tokenizer, run.recipe.answer_tokens, run.display.show
    )
    examples = drop_duplicates(answered)
    figures = SynthesisFigures(
        examples=len(examples),
        replaced_answers=replaced_answers,
        duplicates=len(answered) - len(examples),
        distinct_trigrams=round(distinct_trigrams([qa.question for qa in examples]), 3),
        samples=[[qa.question, qa.answer] for qa in examples[:: max(1, len(examples) // 12)]],
    )
    stored = {"facts": fact_pairs, "figures": asdict(figures), "examples": [asdict(qa) for qa in examples]}
    write_json(path, stored)
    return examples, figures


def general_training_examples(base: ModelFolder, recipe: AdapterRecipe) -> tuple[list[SyntheticQA], list[TokenTargets]]:
    """General prompts and the base model's answers to them, which the adapter must reproduce."""
    rng = seeded_rng("sums")
    prompts = training_general_prompts() + [arithmetic_prompt(rng) for _ in range(ARITHMETIC_PROMPT_COUNT)]
    return general_examples(base, prompts, GENERATED_GENERAL_PROMPTS, recipe)


def has_new_facts(person: Person, inputs: AdapterInputs, base: ModelFolder) -> bool:
    """Whether there are facts that the current adapter was not trained on."""
    trained_facts = person.adapter_inputs.facts if person.adapter_for(base) else ()
    return not set(inputs.facts) <= set(trained_facts)


def put_in_place(person: Person, run: AdapterRun, merged: MergedFacts, record: NightRecord) -> None:
    """Put the new adapter and the new facts in place.

    The adapter comes first: after a crash in between, the stored facts are behind, and the next night repeats this one.
    """
    old = person.path / ".adapter.old"
    shutil.rmtree(old, ignore_errors=True)
    if (person.path / "adapter").exists():
        os.replace(person.path / "adapter", old)
    os.replace(run.folder / "adapter", person.path / "adapter")
    shutil.rmtree(old, ignore_errors=True)
    person.write_facts(merged.facts)
    person.write_last_processed_id(record.last_entry_id)


def report(person: Person, run: AdapterRun, record: NightRecord) -> None:
    """Write the HTML report, and print the result."""
    path = run.folder / "report.html"
    write_report(path, person.name, record)
    run.display.print(f"night {record.number}: the new adapter was {record.status}")
    run.display.print(
        f"recall in held-out phrasings: {record.after.recall:.0%} of the questions about {record.facts} facts"
        f" (before: {record.before.recall:.0%})"
    )
    if record.after.wrong_answers:
        run.display.print("wrong answers:")
    for question, answer in record.after.wrong_answers:
        run.display.print(f"  {question}  {answer}")
    run.display.print(f"report: {path}")


# -- helpers ----------------------------------------------------------------------------------------------------------


def drop_duplicates(examples: list[SyntheticQA]) -> list[SyntheticQA]:
    """Without examples whose question and answer differ from an earlier one's in case and punctuation only."""
    first_of_each: dict[str, SyntheticQA] = {}
    for qa in examples:
        first_of_each.setdefault(normalized(qa.question + qa.answer), qa)
    return list(first_of_each.values())


def distinct_trigrams(texts: list[str]) -> float:
    """Proportion of distinct trigrams among all word trigrams: low if the texts repeat each other."""
    trigrams = []
    for text in texts:
        words = text.split()
        trigrams += zip(words, words[1:], words[2:])
    return len(set(trigrams)) / max(1, len(trigrams))


def show_facts(merged: MergedFacts, display: Display) -> None:
    """Print the current facts, the added ones first."""
    values = {fact.id: fact.value for fact in merged.facts}
    added = {fact.id for fact in merged.added}
    facts = current_facts(merged.facts)
    for fact in sorted(facts, key=lambda fact: (fact.id not in added, fact.key)):
        mark = ""
        if fact.id in added:
            mark = f"(before: {values[fact.supersedes]})" if fact.supersedes is not None else "(new)"
        display.print(f"{fact.id:>4}  {statement(fact.relation, fact.value)}  {mark}")
    if not facts:
        display.print("no facts are stored")
