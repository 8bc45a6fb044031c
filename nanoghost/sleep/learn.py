"""From dreams to an adapter: the teacher answers with the snippet in view, the student learns to without it.

    dream -> answer (the base model reads the snippet; what does not say it truly is replaced) -> lesson
    teacher: base model, snippet in the system message -> its top-20 probabilities of each token of the answer
    student: base model + adapter, no snippet -> 0.7 KL(teacher || student) + 0.3 cross-entropy

The base model stays as it is: an adapter is a function of (base, ledger, seed).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from nanoghost import machine
from nanoghost.chat import render
from nanoghost.engine.generate import generate, open_engine
from nanoghost.engine.sampler import Sampling
from nanoghost.model.lora import attach, new_adapter, save_adapter
from nanoghost.model.weights import load_checkpoint, load_model, save_checkpoint
from nanoghost.optim.optimizer import Optimizer
from nanoghost.optim.schedule import learning_rate
from nanoghost.runs import ModelFolder
from nanoghost.sleep.dream import Dream
from nanoghost.train import stage
from nanoghost.train.distill import distill_step
from nanoghost.train.packing import Lesson, PackedBatches, fill, pack
from nanoghost.train.recipe import later_groups
from nanoghost.train.teacher import GROUP, taught

NOTES = "You are a helpful AI assistant. Facts about the user: {snippet}"
TOP_K = 20
ONCE = ("everyday", "never told")
SURE = -40.0  # log-probability of what an answer that no teacher gave does not say


@dataclass(frozen=True)
class Recipe:
    rank: int = 8
    learning_rate: float = 1e-3
    passes: int = 4
    """How often a night goes through its lessons; those of the kinds ONCE, of which there are many, come once."""
    rows: int = 2
    """Packed rows in a step."""
    context: int = 256
    """Tokens in a row."""
    share: float = 0.7
    """Of the teacher in the loss."""
    answer_tokens: int = 32
    seed: int = 0


def messages_of(dream: Dream, informed: bool) -> list[dict]:
    system = [{"role": "system", "content": NOTES.format(snippet=dream.snippet)}] if informed and dream.snippet else []
    answer = [{"role": "assistant", "content": dream.answer}] if dream.answer is not None else []
    return [*system, {"role": "user", "content": dream.question}, *answer]


class Answers:
    """Greedy answers of a base model, through an adapter if there is one."""

    def __init__(self, base: ModelFolder, adapter: Path | None):
        self.engine = open_engine(base, seats=32, room=1024, adapter=adapter)

    def __call__(self, questions: list[str], snippets: list[str] | None = None, most: int = 48) -> list[str]:
        """`snippets`: what the model may look at, one for each question, or empty."""
        asked = [Dream("", q, snippet=s) for q, s in zip(questions, snippets or [""] * len(questions))]
        return said(self.engine, [messages_of(dream, True) for dream in asked], most)


def said(engine, conversations: list[list[dict]], most: int) -> list[str]:
    """The greedy answer to each conversation, all written at once."""
    prompts = [render(messages, engine.tokenizer, generation=True)[0] for messages in conversations]
    rows = [engine.add(prompt, Sampling(most, 0.0))[0] for prompt in prompts]
    while not all(row.finish_reason for row in rows):
        engine.step()
    return [row.messages[-1]["content"] for row in rows]


def says(answer: str, values) -> bool:
    """Whether an answer contains all values."""
    return all(value.casefold() in answer.casefold() for value in values)


def answered(dreams: list[Dream], fallback, runner, tokenizer, recipe: Recipe) -> tuple[list[Dream], int]:
    """(dreams with their answers, how many of the teacher's were not true and were replaced by `fallback(dream)`)."""
    asked = [d for d in dreams if d.answer is None]
    prompts = [render(messages_of(d, True), tokenizer, generation=True)[0] for d in asked]
    rows = generate(runner, tokenizer, prompts, Sampling(recipe.answer_tokens, 0.0)) if asked else []
    found, replaced = {}, 0
    for dream, row in zip(asked, rows):
        said = row.messages[-1]["content"].strip()
        to_them = "user" not in said and row.finish_reason == "stop"
        true = not dream.values or (says(said, dream.values) and to_them)
        replaced += not true
        found[id(dream)] = replace(dream, answer=said if true else fallback(dream), own_words=true)
    return [found.get(id(d), d) for d in dreams], replaced


def own_questions(count: int, runner, tokenizer) -> list[str]:
    """What the base model expects people to ask it: it goes on where a user's message begins (Xu et al. 2024, "Magpie")."""
    one, other = (render([{"role": "user", "content": text}], tokenizer)[0] for text in ("A", "B"))
    start = one[: next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)]
    [*rows] = generate(runner, tokenizer, [start] * count, Sampling(40, 1.0, top_p=0.95, seed=0, stop=("\n",)))
    texts = (row.messages[0]["content"].strip() for row in rows if row.finish_reason == "stop")
    return list(dict.fromkeys(text for text in texts if len(text) > 3))


def lesson(dream: Dream, tokenizer, informed: bool, most: int) -> Lesson:
    ids, learned = render(messages_of(dream, informed), tokenizer)
    return Lesson(ids[:most], learned[:most])


@torch.no_grad()
def expectations(model, tokenizer, dreams: list[Dream], recipe: Recipe) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the base model expects at each token of each answer, the snippet in view: (ids (N, K), log P (N, K + 1)).

    Of what the teacher did not say itself the answer is expected, whatever it would have said.
    """
    lessons = [lesson(d, tokenizer, True, 2 * recipe.context) for d in dreams]
    settings, found = SimpleNamespace(top_k=TOP_K), {}
    for start in range(0, len(lessons), GROUP):
        some = lessons[start : start + GROUP]
        rows = pack([len(x.ids) for x in some], 2 * recipe.context + 1, range(len(some)))
        ids, logprobs = taught(model, fill(rows, some, 2 * recipe.context, 1), settings, tokenizer.vocab_size)
        order = [i for row in rows for i in row]
        lengths = [sum(some[i].learned) for i in order]
        found |= {start + i: pair for i, pair in zip(order, zip(ids.split(lengths), logprobs.split(lengths)))}
    for i, dream in enumerate(dreams):
        if not dream.own_words:
            ids, logprobs = found[i]
            targets = torch.tensor([t for t, own in zip(lessons[i].ids, lessons[i].learned) if own])
            found[i] = ids, torch.full_like(logprobs, SURE).masked_fill(
                torch.nn.functional.pad(ids == targets[:, None], (0, 1)), 0.0
            )
    return [found[i] for i in range(len(dreams))]


def train(base: Path, card: dict, dreams: list[Dream], folder: Path, recipe: Recipe, stopping, show) -> dict:
    """Write the adapter of these dreams, which have their answers, to folder/adapter; goes on at folder/state."""
    model, tokenizer = load_model(base, machine.compute_dtype(), machine.device())
    said = expectations(model, tokenizer, dreams, recipe)
    attach(model, [new_adapter(model, recipe.rank, None, None, recipe.seed)])
    order = [i for i, d in enumerate(dreams) for _ in range(1 if d.kind in ONCE else recipe.passes)]
    lessons = [lesson(dreams[i], tokenizer, False, recipe.context) for i in order]
    said = [said[i] for i in order]
    said = [tuple(t[: sum(x.learned)] for t in pair) for pair, x in zip(said, lessons)]
    batches = PackedBatches(lessons, recipe.context, recipe.rows, recipe.seed)
    batches.row(0)
    steps = -(-batches.starts[1] // recipe.rows)
    rates = later_groups(card, model.config.width, 1.0)
    rates["lora"] = replace(rates["lora"], learning_rate=recipe.learning_rate)
    optimizer = Optimizer(model, rates, machine.compute_dtype())
    saved = load_checkpoint(folder)
    start, notes = 0, {"seconds": 0.0}
    if saved:
        start, state, notes = saved
        optimizer.load_state(state)
    clock, rate = stage.Clock(notes["seconds"], 60.0), stage.Rate()
    for step in range(start, steps):
        if step > start and (clock.due() or stopping):
            save_checkpoint(folder, step, optimizer.state(), {"seconds": clock.seconds})
        if stopping:
            raise KeyboardInterrupt
        rows, learned = batches.rows_at(step)
        batch = fill(rows, lessons, recipe.context, learned)
        targets = [torch.cat(tensors) for tensors in zip(*(said[i] for row in rows for i in row))]
        loss = distill_step(model, batch, targets, 0.0, recipe.share)
        optimizer.step(learning_rate(step / steps, warmup=0.05, cooldown=0.8))
        rate.count(sum(len(lessons[i].ids) for row in rows for i in row))
        show({"stage": "sleep", "step": step, "steps": steps, "loss": loss, "tokens_per_second": rate.per_second,
              "seconds_left": clock.seconds / (step + 1) * (steps - step - 1)})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder / "adapter", model.adapters[0], base.name)
    return {"steps": steps, "lessons": len(dreams), "tokens": sum(len(x.ids) for x in lessons),
            "seconds": round(clock.seconds, 1), "loss": loss}  # fmt: skip
