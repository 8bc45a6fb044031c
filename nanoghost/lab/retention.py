"""Measures general ability for `nanoghost lab sleep`: a model must retain it while an adapter learns a user's facts.

The measures are answers to general prompts, general knowledge, arithmetic, and bits per byte of plain text, compared
with the base model.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import reasoning_gym

from nanoghost import hardware
from nanoghost.data.registry import open_data_source
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.peft import read_adapter
from nanoghost.home import ModelFolder
from nanoghost.memory.acceptance import general_divergence
from nanoghost.memory.answers import RoutedModel, contains_values, is_refusal
from nanoghost.memory.phrasings import phrasings
from nanoghost.memory.recipe import AdapterRecipe
from nanoghost.memory.router import Router
from nanoghost.memory.store import Fact
from nanoghost.model.lora import attach_adapters

TEXT_TOKENS = 16_384  # length of the plain text
TEXT_WINDOW = 512  # tokens of context in it
PROBLEMS = (("chain_sum", {"max_terms": 2, "max_digits": 1}), ("basic_arithmetic", {"max_terms": 2, "max_digits": 1}))
PROBLEMS_PER_DATASET = 200
MIN_INTRUSION_CHARS = 4  # shorter values occur in general answers by chance

GENERAL_KNOWLEDGE = [  # (question, text that every right answer contains)
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of England?", "London"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Greece?", "Athens"),
    ("What is the capital of Austria?", "Vienna"),
    ("What is the capital of Russia?", "Moscow"),
    ("Which planet do we live on?", "Earth"),
    ("Which planet is known as the Red Planet?", "Mars"),
    ("Which is the biggest planet of the solar system?", "Jupiter"),
    ("What star does the Earth go around?", "Sun"),
    ("What gas do plants take in from the air?", "carbon dioxide"),
    ("What gas do we need to breathe?", "oxygen"),
    ("What is H2O?", "water"),
    ("What is the chemical symbol for iron?", "Fe"),
    ("What is the chemical symbol for oxygen?", "O"),
    ("How many legs does a spider have?", "eight"),
    ("How many days are in a week?", "7"),
    ("How many months are in a year?", "12"),
    ("How many hours are in a day?", "24"),
    ("How many minutes are in an hour?", "60"),
    ("How many sides does a triangle have?", "three"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("Who wrote Pride and Prejudice?", "Austen"),
    ("Who painted The Starry Night?", "Gogh"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("Who was the first president of the United States?", "Washington"),
    ("Which ocean lies between Europe and America?", "Atlantic"),
    ("On which continent is Kenya?", "Africa"),
    ("On which continent is China?", "Asia"),
    ("On which continent is Peru?", "South America"),
    ("What is the longest river in Africa?", "Nile"),
    ("What is the highest mountain on Earth?", "Everest"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What colour is grass?", "green"),
    ("What do bees make?", "honey"),
    ("What do cows give us to drink?", "milk"),
    ("What is the frozen form of water called?", "ice"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of big?", "small"),
    ("What is the opposite of up?", "down"),
    ("What is the opposite of day?", "night"),
    ("What is 2 + 2?", "4"),
    ("What is 5 + 5?", "10"),
    ("What is 10 - 3?", "7"),
    ("What is 3 times 3?", "9"),
    ("What is half of ten?", "5"),
    ("Who made you?", "Hugging Face"),
    ("What is your name?", "SmolLM"),
    ("Which language do people speak in France?", "French"),
    ("Which language do people speak in Mexico?", "Spanish"),
    ('Translate "hello" into Spanish.', "hola"),
    ('Translate "thank you" into French.', "merci"),
    ("What is the past tense of go?", "went"),
    ("What is the plural of child?", "children"),
    ("Which organ pumps blood through the body?", "heart"),
    ("Which animal barks?", "dog"),
]


@dataclass(frozen=True)
class GeneralFigures:
    """General ability of a base model with an adapter.

    All figures but `kl_nats` and `bits_per_byte` are measured with the router, which sends general questions to the
    base model.
    """

    intrusions: int
    """Number of general prompts whose answer mentions a stored value, though the base model's answer does not."""
    general_false_refusals: int
    """Number of general prompts that are refused, though the base model answers them."""
    spoiled_answers: list[list[str]]
    """[prompt, answer] of the intrusions and the false refusals."""
    general_knowledge: float
    """Accuracy on GENERAL_KNOWLEDGE."""
    reasoning_gym: float
    """Accuracy on simple arithmetic problems of reasoning-gym."""
    kl_nats: float
    """KL(base || base + adapter) per token of general answers, in nats."""
    bits_per_byte: float
    """Bits per byte of the plays' test text."""


def measure_general_ability(
    base: ModelFolder, adapter: Path | None, router: Router | None, facts: list[Fact], split: str
) -> GeneralFigures:
    """`router`: None if the adapter answers every question. `facts`: stored facts, whose values must not intrude."""
    base_alone = RoutedModel(base, None, None)
    model = RoutedModel(base, adapter, router)
    prompts = phrasings()["general_prompts"][split]
    values = [fact.value for fact in facts if len(fact.value) >= MIN_INTRUSION_CHARS]
    intrusions, refusals = [], []
    for prompt, base_answer, answer in zip(prompts, base_alone.answer(prompts), model.answer(prompts)):
        if intrudes(values, base_answer, answer):
            intrusions.append([prompt, answer])
        if is_refusal(answer) and not is_refusal(base_answer):
            refusals.append([prompt, answer])
    return GeneralFigures(
        intrusions=len(intrusions),
        general_false_refusals=len(refusals),
        spoiled_answers=intrusions + refusals,
        general_knowledge=general_knowledge_accuracy(model),
        reasoning_gym=reasoning_gym_accuracy(model),
        kl_nats=round(general_divergence(base, adapter, AdapterRecipe()), 4) if adapter else 0.0,
        bits_per_byte=round(plain_text_bits_per_byte(base, adapter), 4),
    )


def intrudes(values: list[str], base_answer: str, answer: str) -> bool:
    """Whether an answer contains a value that the base model's answer does not contain."""
    new_values = [value for value in values if not contains_values(base_answer, [value])]
    return any(contains_values(answer, [value]) for value in new_values)


def general_knowledge_accuracy(model: RoutedModel) -> float:
    answers = model.answer([question for question, _ in GENERAL_KNOWLEDGE])
    return proportion([contains_values(answer, [word]) for answer, (_, word) in zip(answers, GENERAL_KNOWLEDGE)])


def reasoning_gym_accuracy(model: RoutedModel) -> float:
    """Accuracy on PROBLEMS, which a small base model can solve in part. The last number of an answer counts."""
    problems = []
    for name, settings in PROBLEMS:
        dataset = reasoning_gym.create_dataset(name, seed=7, size=PROBLEMS_PER_DATASET, **settings)
        problems += [(entry["question"], entry["answer"]) for entry in dataset]
    answers = model.answer([question for question, _ in problems])
    return proportion([last_number(text) == expected for text, (_, expected) in zip(answers, problems)])


def last_number(text: str) -> str:
    """The last whole number in a text, without commas; "" if there is none."""
    numbers = re.findall(r"-?\d+", text.replace(",", ""))
    return numbers[-1] if numbers else ""


def plain_text_bits_per_byte(base: ModelFolder, adapter: Path | None) -> float:
    """Bits per byte of the first TEXT_TOKENS tokens of the plays' test text."""
    model, tokenizer = load_model(base.path, hardware.compute_dtype(), hardware.device())
    if adapter:
        attach_adapters(model, [read_adapter(adapter, model.config, hardware.compute_dtype())])
    text = next(d.text for d in open_data_source("plays").documents() if d.split == "test")
    ids = tokenizer.encode(text)[:TEXT_TOKENS]
    return bits_per_byte(model, ids, TEXT_WINDOW, len(tokenizer.decode(ids[1:]).encode()))


def proportion(flags: list[bool]) -> float | None:
    """Proportion of true values; None if there are none."""
    return round(sum(flags) / len(flags), 4) if flags else None
