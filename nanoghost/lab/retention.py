"""What a model could do before it slept, and must still be able to: beside the base model's own answers."""

import re
from pathlib import Path

import reasoning_gym

from nanoghost import hardware
from nanoghost.data.sources import open_source
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.peft import read_adapter
from nanoghost.home import ModelFolder
from nanoghost.memory import consolidate, train_adapter
from nanoghost.memory.phrases import book
from nanoghost.model.lora import attach

TOKENS = 16_384  # of plain text
PROBLEMS = (("chain_sum", {"max_terms": 2, "max_digits": 1}), ("basic_arithmetic", {"max_terms": 2, "max_digits": 1}))

BEHAVIOURS = [  # question, what a right answer has in it
    ("What is the capital of France?", "Paris"), ("What is the capital of Italy?", "Rome"), ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Germany?", "Berlin"), ("What is the capital of Japan?", "Tokyo"), ("What is the capital of England?", "London"),
    ("What is the capital of Egypt?", "Cairo"), ("What is the capital of Greece?", "Athens"), ("What is the capital of Austria?", "Vienna"),
    ("What is the capital of Russia?", "Moscow"), ("Which planet do we live on?", "Earth"), ("Which planet is known as the Red Planet?", "Mars"),
    ("Which is the biggest planet of the solar system?", "Jupiter"), ("What star does the Earth go around?", "Sun"),
    ("What gas do plants take in from the air?", "carbon dioxide"), ("What gas do we need to breathe?", "oxygen"),
    ("What is H2O?", "water"), ("What is the chemical symbol for iron?", "Fe"), ("What is the chemical symbol for oxygen?", "O"),
    ("How many legs does a spider have?", "eight"), ("How many days are in a week?", "7"), ("How many months are in a year?", "12"),
    ("How many hours are in a day?", "24"), ("How many minutes are in an hour?", "60"), ("How many sides does a triangle have?", "three"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"), ("Who wrote Pride and Prejudice?", "Austen"), ("Who painted The Starry Night?", "Gogh"),
    ("Who developed the theory of relativity?", "Einstein"), ("Who was the first president of the United States?", "Washington"),
    ("Which ocean lies between Europe and America?", "Atlantic"), ("On which continent is Kenya?", "Africa"),
    ("On which continent is China?", "Asia"), ("On which continent is Peru?", "South America"), ("What is the longest river in Africa?", "Nile"),
    ("What is the highest mountain on Earth?", "Everest"), ("What colour is the sky on a clear day?", "blue"), ("What colour is grass?", "green"),
    ("What do bees make?", "honey"), ("What do cows give us to drink?", "milk"), ("What is the frozen form of water called?", "ice"),
    ("What is the opposite of hot?", "cold"), ("What is the opposite of big?", "small"), ("What is the opposite of up?", "down"),
    ("What is the opposite of day?", "night"), ("What is 2 + 2?", "4"), ("What is 5 + 5?", "10"), ("What is 10 - 3?", "7"),
    ("What is 3 times 3?", "9"), ("What is half of ten?", "5"), ("Who made you?", "Hugging Face"), ("What is your name?", "SmolLM"),
    ("Which language do people speak in France?", "French"), ("Which language do people speak in Mexico?", "Spanish"),
    ("Translate \"hello\" into Spanish.", "hola"), ("Translate \"thank you\" into French.", "merci"), ("What is the past tense of go?", "went"),
    ("What is the plural of child?", "children"), ("Which organ pumps blood through the body?", "heart"), ("Which animal barks?", "dog"),
]  # fmt: skip


def share(flags) -> float | None:
    flags = list(flags)
    return round(sum(flags) / len(flags), 4) if flags else None


def general(base: ModelFolder, adapter: Path | None, always: bool, true: list[dict], split: str) -> dict:
    """What anybody may ask of it, beside the base model's own answers; bits per byte and nats are those of the adapter alone."""
    ask, plain = train_adapter.Answers(base, adapter, always), train_adapter.Answers(base, None)
    everyday = book()["everyday"][split]
    before, now = plain(everyday), ask(everyday)
    values = [r["value"] for r in true if len(r["value"]) > 3]
    intruded = [
        (q, b)
        for q, a, b in zip(everyday, before, now)
        if any(train_adapter.says(b, (v,)) and not train_adapter.says(a, (v,)) for v in values)
    ]
    refused = [
        (q, b) for q, a, b in zip(everyday, before, now) if consolidate.refuses(b) and not consolidate.refuses(a)
    ]
    quiz = BEHAVIOURS
    good = ask([q for q, _ in quiz])
    problems = gym()
    sums = ask([q for q, _ in problems])
    return {
        "intrusions": len(intruded), "refuses_everyday": len(refused), "strayed": intruded + refused,
        "behaviours": share(train_adapter.says(a, (word,)) for a, (_, word) in zip(good, quiz)),
        "gym": share((re.findall(r"-?\d+", a.replace(",", "")) or [""])[-1] == answer for a, (_, answer) in zip(sums, problems)),
        "nats": round(consolidate.moved(base, adapter, train_adapter.Recipe()), 4) if adapter else 0.0,
        "bpb": round(plain_text(base, adapter), 4),
    }  # fmt: skip


def gym() -> list[tuple[str, str]]:
    """400 problems of reasoning-gym, of which the small base model solves some: (question, answer)."""
    problems = []
    for name, settings in PROBLEMS:
        made = reasoning_gym.create_dataset(name, seed=7, size=200, **settings)
        problems += [(entry["question"], entry["answer"]) for entry in made]
    return problems


def plain_text(base: ModelFolder, adapter: Path | None) -> float:
    """Bits per byte of the plays' test text (its first TOKENS)."""
    model, tokenizer = load_model(base.path, hardware.compute_dtype(), hardware.device())
    if adapter:
        attach(model, [read_adapter(adapter, model.config, hardware.compute_dtype())])
    text = next(d.text for d in open_source("plays").documents() if d.split == "test")
    ids = tokenizer.encode(text)[:TOKENS]
    return bits_per_byte(model, ids, 512, len(tokenizer.decode(ids[1:]).encode()))
