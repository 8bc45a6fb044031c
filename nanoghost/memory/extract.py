"""Fact extraction: from a user's messages to (relation, value) pairs, one line each: "sister's name: Ines".

A prompt alone does not make a small model do this. An adapter, the fact extractor, is trained for it, once for each
base model, on synthetic messages (extractor_data.py). It reads a message with the one before it and the
reply to that, because "Her name is Ines." says little alone. Each extracted value must occur in the message itself.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from nanoghost import hardware
from nanoghost.engine.engine import open_engine
from nanoghost.errors import StopFlag
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, home
from nanoghost.memory.answers import greedy_answers
from nanoghost.memory.extractor_data import RelationValue, UserMessage, synthetic_message
from nanoghost.memory.phrasings import seeded_rng
from nanoghost.memory.recipe import AdapterRecipe
from nanoghost.memory.store import LogEntry, Person
from nanoghost.memory.teacher import one_hot_targets
from nanoghost.memory.train_adapter import AdapterExample, AdapterRun, train_adapter
from nanoghost.progress import Display
from nanoghost.tokenizer.chat_format import render
from nanoghost.tools.text_forms import fold
from nanoghost.train.packing import TokenizedExample

INSTRUCTION = (
    "Write down what the user tells now about their own life, one line each, as: what it is: value."
    " If it is nothing, write: nothing"
)
NO_FACTS = "nothing"
MAX_TOKENS = 48  # of an answer
MAX_RELATION_WORDS = 6
TRAINING_MESSAGES = 3000
RECIPE = AdapterRecipe(rank=16, context=384)


# -- messages to process ----------------------------------------------------------------------------------------------


def user_messages(chat_log: list[LogEntry], after_id: int) -> list[tuple[LogEntry, UserMessage]]:
    """The user's messages with an id above `after_id`, each with its context."""
    messages = []
    previous, reply = "", ""
    for entry in chat_log:
        if entry.role != "user":
            reply = entry.text
            continue
        if entry.id > after_id:
            messages.append((entry, UserMessage(entry.text, previous, reply)))
        previous, reply = entry.text, ""
    return messages


def unprocessed_messages(person: Person) -> list[tuple[LogEntry, UserMessage]]:
    """Messages since the last night. `nanoghost memory --add` has stored the facts of its own messages already."""
    stored_sources = {source for fact in person.read_facts() for source in fact.sources}
    messages = user_messages(person.read_chat_log(), person.last_processed_id)
    return [(entry, message) for entry, message in messages if entry.id not in stored_sources]


# -- the fact extractor -----------------------------------------------------------------------------------------------


def conversation(message: UserMessage, facts: list[RelationValue] | None = None) -> list[dict]:
    """The extractor's prompt for a message and, if `facts` are given, its answer."""
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": message.format()}]
    if facts is None:
        return messages
    lines = "\n".join(f"{relation}: {value}" for relation, value in facts)
    return [*messages, {"role": "assistant", "content": lines or NO_FACTS}]


def open_fact_extractor(base: ModelFolder, stop_flag: StopFlag, display: Display) -> Path:
    """Folder of the fact extractor for that base model; it is trained first if there is none yet."""
    rng = seeded_rng("scribe")
    conversations = [conversation(*synthetic_message(rng, "train")) for _ in range(TRAINING_MESSAGES)]
    key = json.dumps([base.card.finished, conversations, asdict(RECIPE)])
    folder = home() / "data" / f"fact-extractor-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "adapter" / "adapter_model.safetensors").exists():
        display.print(
            f"training the fact extractor of {base.name}, once: about 10 minutes"
            " (Ctrl-C stops it; rerun the command to resume)"
        )
        model, tokenizer = load_model(base.path, hardware.compute_dtype(), hardware.device())
        examples = []
        for messages in conversations:
            tokens = TokenizedExample(*render(messages, tokenizer))
            examples.append(AdapterExample(tokens, one_hot_targets(tokens)))
        train_adapter(AdapterRun(base, folder, RECIPE, stop_flag, display), model, examples)
    return folder / "adapter"


def extract_facts(
    base: ModelFolder, extractor: Path, messages: list[UserMessage]
) -> list[tuple[list[RelationValue], list[str]]]:
    """For each message: the extracted facts, and the lines that were rejected."""
    if not messages:
        return []
    engine = open_engine(base, slots=16, slot_tokens=1024, adapter=extractor)
    answers = greedy_answers(engine, [conversation(message) for message in messages], MAX_TOKENS)
    return [parse_facts(answer, message.text) for answer, message in zip(answers, messages)]


def parse_facts(answer: str, message: str) -> tuple[list[RelationValue], list[str]]:
    """(facts, rejected lines): a fact has a short relation, and a value that occurs in the message."""
    facts, rejected = [], []
    for line in answer.split("\n"):
        relation, colon, value = line.partition(":")
        relation = relation.strip()
        value = value.strip().rstrip(".")
        relation_is_short = 0 < len(relation.split()) <= MAX_RELATION_WORDS
        if colon and value and fold(value) in fold(message) and relation_is_short:
            facts.append((relation, value))
        elif line.strip() and line.strip() != NO_FACTS:
            rejected.append(line.strip())
    return list(dict.fromkeys(facts)), rejected
