"""Strangers' lines: what people type first, written by someone who saw neither the tasks nor their phrasings.

strangers.jsonl has a line for each conversation: {"kind", "user": one to three messages, "good": what a good answer
does, "regex": what it must contain, if that can be said}. A line without a regex asks only that the answer is not
broken. No training text may be made from this file.
"""

import json
import re
from functools import cache
from pathlib import Path

from nanoghost import distributed
from nanoghost.engine.sampler import SamplingParams
from nanoghost.evals.task_accuracy import generate_replies, wilson_interval
from nanoghost.tasks.base import Problem
from nanoghost.tasks.messages import final_text, user
from nanoghost.tasks.plays import looks_broken
from nanoghost.tasks.refusal import is_refusal

SAMPLING = SamplingParams(max_tokens=100, temperature=0)


@cache
def strangers_lines() -> list[dict]:
    text = Path(__file__).with_name("strangers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def is_good(line: dict, reply: list[dict]) -> bool:
    """Whether the last answer of a conversation is good, as far as a program can tell."""
    text = final_text(reply)
    if not text or "{" in text or "<|" in text or "\ufffd" in text:
        return False
    if "regex" in line:
        return re.search(line["regex"], text, re.IGNORECASE) is not None
    if line["kind"] == "creative" and (is_refusal(text) or len(text.split()) < 4):
        return False
    return not looks_broken(text)


def hold_conversations(model, tokenizer, lines: list[dict]) -> list[list[dict]]:
    """The messages of all conversations, with the model's greedy answers."""
    conversations: list[list[dict]] = [[] for _ in lines]
    for turn in range(max(len(line["user"]) for line in lines)):
        speaking = [i for i, line in enumerate(lines) if turn < len(line["user"])]
        for i in speaking:
            conversations[i].append(user(lines[i]["user"][turn]))
        problems = [Problem("strangers", tuple(conversations[i]), (), "") for i in speaking]
        for i, reply in zip(speaking, generate_replies(model, tokenizer, problems, SAMPLING)):
            conversations[i] += reply.messages
    return conversations


def strangers_accuracy(model, tokenizer, count: int) -> dict[str, dict]:
    """{"strangers_KIND": {"label", "accuracy", "low", "high", "count"}} of about `count` lines, evenly spaced.

    The processes share the conversations.
    """
    rank, world_size = distributed.rank_and_world_size()
    lines = strangers_lines()[:: max(1, round(len(strangers_lines()) / count))]
    kinds = dict.fromkeys(line["kind"] for line in lines)
    lines = lines[rank::world_size]
    conversations = hold_conversations(model, tokenizer, lines)
    verdicts = [(line["kind"], is_good(line, messages)) for line, messages in zip(lines, conversations)]
    by_kind: dict[str, list[bool]] = {}
    for verdict_list in distributed.all_gather_object(verdicts):
        for kind, good in verdict_list:
            by_kind.setdefault(kind, []).append(good)
    results = {}
    for kind in kinds:
        good, count = sum(by_kind[kind]), len(by_kind[kind])
        low, high = wilson_interval(good, count)
        label = f"strangers' lines: {kind}"
        results[f"strangers_{kind}"] = {
            "label": label,
            "accuracy": good / count,
            "low": low,
            "high": high,
            "count": count,
        }
    return results
