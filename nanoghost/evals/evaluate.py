"""Evaluation of a finished model: bits per byte, accuracy on held-out problems, sample conversations, memorization.

The figures are one event `STAGE-eval` in the model's event log; report.py shows it.
"""

import time
from dataclasses import asdict, dataclass

from nanoghost import distributed, hardware
from nanoghost.data.registry import open_data_source
from nanoghost.data.sources import Document
from nanoghost.data.tokenize_source import tokenize_source
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.evals.strangers import strangers_accuracy
from nanoghost.evals.task_accuracy import accuracy, generate_replies
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder
from nanoghost.progress import Display
from nanoghost.tasks.base import Problem, distinct_problems
from nanoghost.tasks.messages import user
from nanoghost.tasks.registry import evaluated_tasks
from nanoghost.train.hyperparameters import finetune_context

SAMPLE_QUESTIONS = (  # the report shows every model's answers to these, good or bad
    "Who are you?",
    "What is 738 + 4096?",
    'How many s are there in "possession"?',
    "What is the weather in London today?",
    "Good morrow, my lord. What news from the king?",
)
INVERSE_GOLDEN_RATIO = 0.618034  # 1 / golden ratio: the fractional parts of its multiples are evenly spread over [0, 1)


@dataclass(frozen=True)
class MemorizedPassage:
    """The longest passage of training text that a model recites from a prompt of 16 tokens."""

    characters: int = 0
    text: str = ""
    source: str = ""
    """Name of the document."""


def evaluate(folder: ModelFolder, num_problems: int, display: Display) -> dict:
    """Evaluate a finished model on `num_problems` held-out problems of each task. Appends the event and returns it."""
    hardware.prepare()
    distributed.init_distributed()
    start = time.perf_counter()
    card = folder.card
    base = card.root
    model, tokenizer = load_model(folder.path, hardware.compute_dtype(), hardware.device())
    results = {}
    for name, task in evaluated_tasks(base, folder.name).items():
        display.print(f"  {folder.name}: {num_problems} held-out problems of {name} ...")
        figures, _ = accuracy(model, tokenizer, task, distinct_problems(task, num_problems))
        results[name] = {"label": task.label} | figures
    results |= strangers_accuracy(model, tokenizer, num_problems)
    event = {
        "stage": f"{card.stage}-eval",
        "step": card.steps,
        "model": folder.name,
        "bpb": card.figures.get("bpb") or held_out_bpb(model, tokenizer, base),
        "kneser_ney_bpb": base.figures.get("kneser_ney_bpb"),
        "tasks": results,
        "samples": sample_conversations(model, tokenizer),
        "memorized": asdict(longest_memorized_passage(model, tokenizer, base)),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return folder.append_event(event) if distributed.is_main_process() else event


def held_out_bpb(model, tokenizer, base: ModelCard) -> float:
    """Bits per byte on the test split of the base model's training text (for adopted models: of the plays)."""
    dataset = tokenize_source(open_data_source(base.settings["data"]), tokenizer)
    return bits_per_byte(model, dataset.tokens("test"), finetune_context(model.config.context), dataset.bytes("test"))


def sample_conversations(model, tokenizer) -> list[dict]:
    """One conversation for each of SAMPLE_QUESTIONS, at the temperature of the chat, with a fixed seed."""
    problems = [Problem("sample", (user(question),), (), "") for question in SAMPLE_QUESTIONS]
    sampling = SamplingParams(max_tokens=80, temperature=0.7, top_p=0.95, seed=1)
    replies = generate_replies(model, tokenizer, problems, sampling)
    return [{"messages": [*problem.messages, *reply.messages]} for problem, reply in zip(problems, replies)]


def longest_memorized_passage(
    model, tokenizer, base: ModelCard, num_passages: int = 64, prompt_tokens: int = 16
) -> MemorizedPassage:
    """Prompt the model with the start of evenly spaced passages, and compare its greedy completion with the text.

    The text is the base model's training text; for adopted models, whose training text is unknown, the plays.
    """
    documents = [d for d in open_data_source(base.settings["data"]).documents() if d.split == "train"]
    prompts: list[tuple[Document, str, list[int]]] = []
    for i in range(num_passages):
        document = documents[i * len(documents) // num_passages]
        start = int(len(document.text) * ((i * INVERSE_GOLDEN_RATIO) % 1.0))
        passage = document.text[start : start + 600]
        ids = tokenizer.encode(passage)[:prompt_tokens]
        if len(ids) == prompt_tokens:
            prompts.append((document, passage, ids))
    rank, world_size = distributed.rank_and_world_size()
    longest = MemorizedPassage()
    if local_prompts := prompts[rank::world_size]:
        sampling = SamplingParams(max_tokens=96, temperature=0)
        completions = generate(model, tokenizer, [ids for _, _, ids in local_prompts], sampling)
        for (document, passage, ids), completion in zip(local_prompts, completions):
            continuation = passage[len(tokenizer.decode(ids)) :]
            text = common_prefix(continuation, tokenizer.decode(completion.completion_ids))
            if len(text) > longest.characters:
                longest = MemorizedPassage(len(text), text, document.name)
    if prompts:
        longest_by_rank = distributed.all_gather_object(longest)
        longest = max(longest_by_rank, key=lambda passage: passage.characters)
    return longest


def common_prefix(a: str, b: str) -> str:
    length = 0
    for x, y in zip(a, b):
        if x != y:
            break
        length += 1
    return a[:length]
