"""From dreams to an adapter: the teacher answers with the snippet in view, the student learns to without it.

    dream -> answer (the base model reads the snippet; what does not say it truly is replaced) -> lesson
    teacher: base model, snippet in the system message -> its top-20 probabilities of each token of what it said,
             or certainty, where it did not say it truly
    student: base model + adapter, no snippet -> KL(teacher || student)

The base model stays as it is: an adapter is a function of (base, ledger, seed).
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch

from nanoghost import hardware
from nanoghost.engine.generate import generate, open_engine, steps
from nanoghost.engine.sampler import Sampling
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.peft import save_adapter
from nanoghost.home import ModelFolder, home, write_atomic
from nanoghost.memory.router import router
from nanoghost.memory.synthesize import Dream
from nanoghost.model.layers import shared_prompts
from nanoghost.model.lora import attach, new_adapter
from nanoghost.optim.optimizer import Optimizer
from nanoghost.optim.schedule import learning_rate
from nanoghost.tokenizer.chat_format import render
from nanoghost.train import run as stage
from nanoghost.train.checkpoints import Checkpoints
from nanoghost.train.distill_loss import bucket_logprobs, divergence
from nanoghost.train.hyperparameters import later_groups
from nanoghost.train.packing import Lesson, PackedBatches, fill, pack
from nanoghost.train.teacher_cache import GROUP, taught

NOTES = "You are a helpful AI assistant. Facts about the user: {snippet}"
TOP_K = 20
SURE = -40.0  # log-probability of what an answer that no teacher gave does not say


@dataclass(frozen=True)
class Recipe:
    rank: int = 8
    learning_rate: float = 1e-3
    context: int = 256
    """Tokens in a step, without the beginning that all lessons share."""
    share: float = 0.5
    """Of the teacher in what is expected where a fact is told; the rest expects what it said."""
    answer_tokens: int = 32
    everyday_tokens: int = 24
    """Of the answers to everyday prompts that are held to the base model's."""
    everyday_weight: float = 1.5
    """Of each of them; a token of an answer about the person weighs 1."""
    seed: int = 0


def messages_of(dream: Dream, informed: bool) -> list[dict]:
    system = [{"role": "system", "content": NOTES.format(snippet=dream.snippet)}] if informed and dream.snippet else []
    answer = [{"role": "assistant", "content": dream.answer}] if dream.answer is not None else []
    return [*system, {"role": "user", "content": dream.question}, *answer]


class Answers:
    """Greedy answers of a base model, and of an adapter where there is one and a question concerns the person who asks."""

    def __init__(self, base: ModelFolder, adapter: Path | None, always: bool = False):
        """`always`: the adapter answers whatever is asked."""
        self.engine = open_engine(base, seats=32, room=1024, adapter=adapter)
        self.router = router() if adapter and not always else None

    def __call__(self, questions: list[str], snippets: list[str] | None = None, most: int = 48) -> list[str]:
        """`snippets`: what the model may look at, one for each question, or empty; only the adapter does where there is one."""
        asked = [Dream("", q, snippet=s) for q, s in zip(questions, snippets or [""] * len(questions))]
        own = [not self.router or self.router.concerns(messages_of(dream, False)) for dream in asked]
        through = [self.engine.adapter if mine else "" for mine in own]
        return said(self.engine, [messages_of(dream, mine) for dream, mine in zip(asked, own)], most, through)


def said(engine, conversations: list[list[dict]], most: int, adapters: list[str] | None = None) -> list[str]:
    """The greedy answer to each conversation, all written at once; `adapters`: through which each goes, if not the engine's."""
    prompts = [render(messages, engine.tokenizer, generation=True)[0] for messages in conversations]
    through = adapters or [None] * len(prompts)
    rows = [engine.add(prompt, Sampling(most, 0.0), adapter=name)[0] for prompt, name in zip(prompts, through)]
    while not all(row.finish_reason for row in rows):
        engine.step()
    return [row.messages[-1]["content"] for row in rows]


def says(answer: str, values) -> bool:
    """Whether an answer contains all values, each as a word of its own (4 is not in 42)."""
    return all(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer, re.IGNORECASE) for value in values)


def follows(answer: str, dream: Dream) -> bool:
    """Whether an answer says all values and nothing that its opening and the snippet do not say."""
    known = set(words(f"{dream.snippet} {dream.opening}")) - {"user"} | PARTICLES
    return says(answer, dream.values) and known.issuperset(words(answer))


PARTICLES = set("a an and at called in is it on s the to you your".split())


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def answered(
    dreams: list[Dream], fallback, runner, tokenizer, recipe: Recipe, show=lambda event: None
) -> tuple[list[Dream], int]:
    """(dreams with their answers, how many of the teacher's were not true and were replaced by `fallback(dream)`)."""
    asked = [d for d in dreams if d.answer is None]
    prompts = [render(messages_of(d, True), tokenizer, generation=True)[0] + tokenizer.encode(d.opening) for d in asked]
    rows = []
    for rows in steps(runner, tokenizer, prompts, Sampling(recipe.answer_tokens, 0.0)) if asked else ():
        show({"stage": "think", "step": sum(bool(row.finish_reason) for row in rows) - 1, "steps": len(rows)})
    found, replaced = {}, 0
    for dream, row in zip(asked, rows):
        said = (dream.opening + row.messages[-1]["content"]).strip()
        true = not dream.values or (row.finish_reason == "stop" and follows(said, dream))
        replaced += not true
        found[id(dream)] = replace(
            dream, answer=said if true else fallback(dream), own_words=true, cut=row.finish_reason != "stop"
        )
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
    if dream.cut:  # the answer went on: nothing is learned of where it ends
        most = min(most, max(i for i, own in enumerate(learned) if own))
    return Lesson(ids[:most], learned[:most])


@torch.no_grad()
def expectations(model, tokenizer, dreams: list[Dream], recipe: Recipe) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What is expected at each token of each answer: (ids (N, K), log P (N, K + 1)).

    By the base model with the snippet in view, where it said the answer itself; elsewhere by whoever knows the answer.
    """
    found = [None] * len(dreams)
    own = [i for i, d in enumerate(dreams) if d.own_words]
    settings = SimpleNamespace(top_k=TOP_K)
    for some in (own[start : start + GROUP] for start in range(0, len(own), GROUP)):
        lessons = [lesson(dreams[i], tokenizer, True, 2 * recipe.context) for i in some]
        rows = pack([len(x.ids) for x in lessons], 2 * recipe.context + 1, range(len(some)))
        ids, logprobs = taught(model, fill(rows, lessons, 2 * recipe.context, 1), settings, tokenizer.vocab_size)
        order = [i for row in rows for i in row]
        lengths = [sum(lessons[i].learned) for i in order]
        for i, pair in zip(order, zip(ids.split(lengths), logprobs.split(lengths))):
            found[some[i]] = firmer(pair, lessons[i], dreams[some[i]], tokenizer, recipe)
    return [pair or certain(lesson(d, tokenizer, False, recipe.context)) for d, pair in zip(dreams, found)]


def firmer(pair, lesson: Lesson, dream: Dream, tokenizer, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """What a teacher expected, where a fact is told: certain of how the answer begins, and surer of what it said itself."""
    ids, logprobs = pair
    if not dream.values:
        return pair
    targets = torch.tensor([t for t, learned in zip(lesson.ids, lesson.learned) if learned])
    share = torch.full((len(ids), 1), recipe.share)
    share[: len(tokenizer.encode(dream.opening))] = 0.0
    said = torch.nn.functional.pad((ids == targets[:, None]).float(), (0, 1))
    return ids, (share * logprobs.exp() + (1 - share) * said).clamp_min(1e-17).log()


def certain(lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where what comes next is known: ids (N, K) and log P (N, K + 1) of a teacher that is certain of it."""
    targets = torch.tensor([t for t, learned in zip(lesson.ids, lesson.learned) if learned])
    others = torch.arange(TOP_K - 1).expand(len(targets), -1)
    ids = torch.cat([targets[:, None], others.where(others != targets[:, None], TOP_K - 1)], 1)  # each once
    logprobs = torch.full((len(targets), TOP_K + 1), SURE)
    logprobs[:, 0] = 0.0
    return ids, logprobs


def everyday(base: ModelFolder, prompts: list[str], own: int, recipe: Recipe) -> tuple[list[Dream], list]:
    """The base model's answers to `prompts` and to `own` questions that it thinks of, and what it expected there.

    They belong to the base model, not to a person: made once, kept in the data folder.
    """
    key = json.dumps(
        [base.card["finished"], prompts, own, recipe.everyday_tokens, recipe.context, str(hardware.compute_dtype())]
    )
    path = home() / "data" / f"everyday-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        runner = open_engine(base, seats=32, room=1024).runner
        model, tokenizer = load_model(base.path, hardware.compute_dtype(), hardware.device())
        asked = [Dream("everyday", q) for q in [*prompts, *(own_questions(own, runner, tokenizer) if own else [])]]
        dreams, _ = answered(asked, None, runner, tokenizer, replace(recipe, answer_tokens=recipe.everyday_tokens))
        ids, logprobs = zip(*expectations(model, tokenizer, dreams, recipe))
        said = json.dumps([[d.question, d.answer, d.cut] for d in dreams])
        tensors = {
            "ids": torch.cat(ids).int(),
            "logprobs": torch.cat(logprobs),
            "lengths": torch.tensor([len(x) for x in ids]),
        }
        write_atomic(path, safetensors.torch.save(tensors, {"said": said}))
    with safetensors.safe_open(path, "pt") as f:
        said, lengths = json.loads(f.metadata()["said"]), f.get_tensor("lengths").tolist()
        ids, logprobs = f.get_tensor("ids").long().split(lengths), f.get_tensor("logprobs").split(lengths)
    return [Dream("everyday", q, a, own_words=True, cut=cut) for q, a, cut in said], list(zip(ids, logprobs))


def train(
    base: Path,
    card: dict,
    dreams: list[Dream],
    known: tuple[list[Dream], list],
    folder: Path,
    recipe: Recipe,
    stopping,
    show,
) -> dict:
    """Write the adapter of these dreams, which have their answers, to folder/adapter; goes on at folder/state.

    `known`: everyday dreams and what is expected there (`everyday`).
    """
    model, tokenizer = load_model(base, hardware.compute_dtype(), hardware.device())
    said = [*expectations(model, tokenizer, dreams, recipe), *known[1]]
    weights = [1.0] * len(dreams) + [recipe.everyday_weight] * len(known[0])
    dreams = [*dreams, *known[0]]
    lessons = [lesson(d, tokenizer, False, recipe.context) for d in dreams]
    said = [tuple(t[: sum(x.learned)] for t in pair) for pair, x in zip(said, lessons)]
    return fit(model, base.name, card, lessons, said, weights, folder, recipe, stopping, show)


def fit(
    model,
    base: str,
    card: dict,
    lessons: list[Lesson],
    said: list,
    weights: list[float],
    folder: Path,
    recipe: Recipe,
    stopping,
    show,
) -> dict:
    """A new adapter learns, going through `lessons` once, to expect at each of their learned tokens what is `said`.

    `weights`: what a learned token counts, for each lesson.
    """
    attach(model, [new_adapter(model, recipe.rank, None, None, recipe.seed)])
    beginning = os.path.commonprefix([x.ids for x in lessons])
    lessons = [Lesson(x.ids[len(beginning) :], x.learned[len(beginning) :]) for x in lessons]
    batches = PackedBatches(lessons, recipe.context, 1, recipe.seed)
    batches.row(0)
    steps = batches.starts[1]
    rates = later_groups(card, model.config.width, 1.0)
    rates["lora"] = replace(rates["lora"], learning_rate=recipe.learning_rate)
    optimizer = Optimizer(model, rates, hardware.compute_dtype())
    checkpoints = Checkpoints(folder / "state")
    start, notes = checkpoints.load(optimizer)
    clock, rate = stage.Clock(notes.get("seconds", 0.0), 60.0), stage.Rate()
    for step in range(start, steps):
        if step > start and (clock.due() or stopping):
            checkpoints.settle()
            checkpoints.save(step, optimizer.state(), {"seconds": clock.seconds})
        if stopping:
            checkpoints.settle()
        stopping.check()
        some = batches.row(step)
        counts = torch.tensor([weights[i] for i in some for own in lessons[i].learned if own])
        loss = (counts * losses(model, beginning, [lessons[i] for i in some], [said[i] for i in some])).mean()
        loss.backward()
        optimizer.step(learning_rate(step / steps, warmup=0.05, cooldown=0.8))
        rate.count(sum(len(lessons[i].ids) for i in some))
        show({"stage": "sleep", "step": step, "steps": steps, "loss": loss.item(), "tokens_per_second": rate.per_second,
              "seconds_left": clock.seconds / (step + 1) * (steps - step - 1)})  # fmt: skip
    checkpoints.settle()
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder / "adapter", model.adapters[0], base)
    shutil.rmtree(folder / "state", ignore_errors=True)
    return {"steps": steps, "lessons": len(lessons), "tokens": sum(len(x.ids) for x in lessons),
            "seconds": round(clock.seconds, 1), "loss": loss.item()}  # fmt: skip


def losses(model, beginning: list[int], lessons: list[Lesson], said: list) -> torch.Tensor:
    """KL(expected || model) of each learned token of lessons that stand behind one `beginning`, which is read once: (N,)."""
    tokens, layout, places = shared_prompts(
        [beginning], [[x.ids for x in lessons]], model.head.dtype, hardware.device()
    )
    learned = torch.tensor([own for x in lessons for own in x.learned])
    ids, logprobs = (torch.cat(tensors) for tensors in zip(*said))
    hidden = model.hidden(tokens, layout)[tuple(place[learned] for place in places)]
    return divergence(bucket_logprobs(hidden, model.head, ids), logprobs, 0.0)
