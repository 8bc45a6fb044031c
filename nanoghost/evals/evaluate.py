"""Evaluation: bits per byte on held-out text, accuracy on held-out problems, samples, and what was memorised."""

import json
import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanoghost import distributed, hardware
from nanoghost.data.registry import open_source
from nanoghost.data.tokenize_source import tokenize_source
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.evals.task_accuracy import accuracy, attempt
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, open_model
from nanoghost.progress import Display
from nanoghost.tasks.base import Problem, distinct_problems
from nanoghost.tasks.messages import user
from nanoghost.tasks.registry import evaluated_tasks
from nanoghost.train.hyperparameters import finetune_context

QUESTIONS = (  # asked of every model; the answers go into the report as they come
    "Who are you?",
    "What is 738 + 4096?",
    'How many s are there in "possession"?',
    "What is the weather in London today?",
    "Good morrow, my lord. What news from the king?",
)

UNKNOWN = "whether it was trained on this text, its makers alone know"


@dataclass(frozen=True)
class EvalSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    problems: int = 500
    """Held-out problems of each skill."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def evaluate(folder: ModelFolder, problems: int, display: Display) -> dict:
    """Measure a finished model, append the figures to its events, and return them."""
    hardware.prepare()
    distributed.init_distributed()
    start = time.perf_counter()
    card = folder.card
    base = card.root
    model, tokenizer = load_model(folder.path, hardware.compute_dtype(), hardware.device())
    results = {}
    for name, task in evaluated_tasks(base, folder.name).items():
        display.print(f"  {folder.name}: {problems} held-out problems of {name} ...")
        figures, _ = accuracy(model, tokenizer, task, distinct_problems(task, problems))
        results[name] = {"label": task.label} | figures
    figures = {
        "model": folder.name,
        "bpb": card.figures.get("bpb") or held_out_bpb(model, tokenizer, base),
        "kneser_ney_bpb": base.figures.get("kneser_ney_bpb"),
        "tasks": results,
        "samples": samples(model, tokenizer),
        "memorised": memorised(model, tokenizer, base),
        "seconds": round(time.perf_counter() - start, 1),
    }
    event = {"stage": f"{card.stage}-eval", "step": card.steps, **figures}
    return folder.append_event(event) if distributed.rank_and_world_size()[0] == 0 else event


def held_out_bpb(model, tokenizer, base: ModelCard) -> float:
    """On the same test text that the base model was scored on; the plays, if others trained it."""
    shards = tokenize_source(open_source(base.settings["data"]), tokenizer)
    return bits_per_byte(model, shards.tokens("test"), finetune_context(model.config.context), shards.bytes("test"))


def samples(model, tokenizer) -> list[dict]:
    """One conversation for each of QUESTIONS, at the chat's own temperature and a fixed seed."""
    asked = [Problem("sample", (user(q),), (), "") for q in QUESTIONS]
    rows = attempt(model, tokenizer, asked, SamplingParams(max_tokens=80, temperature=0.7, top_p=0.95, seed=1))
    return [{"messages": [*p.messages, *row.messages]} for p, row in zip(asked, rows)]


def memorised(model, tokenizer, base: ModelCard, starts: int = 64, prompt_tokens: int = 16) -> dict:
    """The longest passage of training text that the model recites after 16 tokens of it, from evenly spaced starts.

    Of the plays, if others trained it on texts that they alone know.
    """
    documents = [d for d in open_source(base.settings["data"]).documents() if d.split == "train"]
    pieces = []
    for i in range(starts):
        document = documents[i * len(documents) // starts]
        at = int(len(document.text) * ((i * 0.618034) % 1.0))
        pieces.append((document, document.text[at : at + 600]))
    encoded = [(d, text, tokenizer.encode(text)[:prompt_tokens]) for d, text in pieces]
    encoded = [e for e in encoded if len(e[2]) == prompt_tokens]
    if not encoded:
        return {"characters": 0, "text": "", "source": ""}
    encoded = encoded[distributed.rank_and_world_size()[0] :: distributed.rank_and_world_size()[1]]  # processes share the work
    rows = (
        generate(model, tokenizer, [ids for _, _, ids in encoded], SamplingParams(max_tokens=96, temperature=0))
        if encoded
        else []
    )
    best = {"characters": 0, "text": "", "source": ""}
    for (document, text, ids), row in zip(encoded, rows):
        truth, said = text[len(tokenizer.decode(ids)) :], tokenizer.decode(row.completion_ids)
        same = next((i for i, (a, b) in enumerate(zip(truth, said)) if a != b), min(len(truth), len(said)))
        if same > best["characters"]:
            best = {"characters": same, "text": said[:same], "source": document.name}
    return max(distributed.all_gather_object(best), key=lambda found: found["characters"])


def command(settings: EvalSettings) -> None:
    if settings.problems < 1:
        raise UserError("--problems must be at least 1")
    figures = evaluate(open_model(settings.model), settings.problems, Display())
    for name, a in figures["tasks"].items():
        Display().print(f"{name:>15}  {a['accuracy']:6.1%}  (95%: {a['low']:.1%} to {a['high']:.1%}, n = {a['count']})")
    floor = figures["kneser_ney_bpb"]
    beside = f"counting, Kneser-Ney: {floor:.3f}" if floor else UNKNOWN
    Display().print(f"{'held-out bpb':>15}  {figures['bpb']:.3f}  ({beside})")
    if settings.json and distributed.rank_and_world_size()[0] == 0:
        print(json.dumps({k: figures[k] for k in ("model", "bpb", "kneser_ney_bpb", "tasks", "memorised", "seconds")}))
