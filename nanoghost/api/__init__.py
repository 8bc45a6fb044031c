"""The supported Python API: load a model, chat, generate, score a text, train a stage. docs/api.md has examples.

    model = load("smollm2")
    print(model.chat([{"role": "user", "content": "What is a tide?"}], max_tokens=100).text)

Wrong names, settings and inputs raise `UserError`. The names in `__all__` are stable; the modules that they come from
may change.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

from nanoghost import hardware
from nanoghost.data.conversations import check_messages
from nanoghost.engine.engine import Engine, open_engine
from nanoghost.engine.prompt_logprobs import prompt_logprobs
from nanoghost.engine.sampler import SamplingParams, check_sampling
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, open_model
from nanoghost.tokenizer.chat_format import render, text_of
from nanoghost.tools.registry import run_tool, tools_for_model
from nanoghost.train import distill, pretrain, rl, sft

__all__ = ["Completion", "Model", "Score", "UserError", "load", "train"]

STAGES = {
    "pretrain": (pretrain.PretrainSettings, pretrain.main),
    "sft": (sft.SftSettings, sft.main),
    "rl": (rl.RlSettings, rl.main),
    "distill": (distill.DistillSettings, distill.main),
}


@dataclass(frozen=True)
class Completion:
    text: str
    """Text of the reply, or the continuation of the prompt."""
    messages: list[dict]
    """New messages in OpenAI's form: the reply, after tool calls and their results if there are any."""
    finish_reason: str
    """stop: the model ended the text, or a stop text occurred; length: `max_tokens` or the context is used up."""


@dataclass(frozen=True)
class Score:
    logprobs: list[float]
    """log P, in nats, of each token but the first, which nothing precedes."""
    bits_per_byte: float
    """Negative sum of `logprobs`, in bits, per byte of these tokens."""


class Model:
    """A model that `load` has loaded for inference. `sampling`: fields of SamplingParams (docs/api.md)."""

    def __init__(self, folder: ModelFolder, engine: Engine):
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.tools = tools_for_model(folder, self.tokenizer.chat_template, documents=None)

    def chat(self, messages: list[dict], **sampling) -> Completion:
        """Reply to a conversation: messages in OpenAI's form. Tools that the model was trained to call are run."""
        return self.chat_batch([messages], **sampling)[0]

    def chat_batch(self, conversations: list[list[dict]], **sampling) -> list[Completion]:
        """Reply to several conversations at the same time; the completions are in their order."""
        schemas = [tool.schema for tool in self.tools.values()]
        prompts = []
        for i, messages in enumerate(conversations):
            checked = check_messages(messages, f"conversation {i}")
            prompts.append(render(checked, self.tokenizer, add_generation_prompt=True, tools=schemas)[0])
        return self._complete(prompts, sampling, partial(run_tool, tools=self.tools) if self.tools else None)

    def generate(self, prompt: str, **sampling) -> Completion:
        """Continue a text."""
        return self.generate_batch([prompt], **sampling)[0]

    def generate_batch(self, prompts: list[str], **sampling) -> list[Completion]:
        """Continue several texts at the same time; the completions are in their order."""
        if not all(prompts):
            raise UserError("a prompt is empty: give it at least one character")
        return self._complete([self.tokenizer.encode(prompt) for prompt in prompts], sampling)

    def _complete(
        self, prompts: list[list[int]], sampling: dict, tool_runner: Callable[[dict], str] | None = None
    ) -> list[Completion]:
        params = settings_from(SamplingParams, sampling, "sampling")
        check_sampling(params)
        sequences = []
        try:
            for i, prompt_ids in enumerate(prompts):  # each with random numbers of its own
                sequences += self.engine.add(prompt_ids, params, run_tool=tool_runner, rng_stream=i)
            while self.engine.has_unfinished:
                self.engine.step()
        finally:  # also after Ctrl-C, or if one of the prompts is too long: the next call starts with an empty engine
            for sequence in sequences:
                self.engine.cancel(sequence)
        completions = []
        for sequence in sequences:
            text = text_of(sequence.messages[-1])
            completions.append(Completion(text, sequence.messages, sequence.finish_reason))
        return completions

    def score(self, text: str) -> Score:
        """Log-probabilities of a text of any length, in windows of the model's context.

        Consecutive windows share one token, because the first token of a window is not scored. Raises UserError if the
        text has fewer than two tokens.
        """
        ids = self.tokenizer.encode(text)
        context = self.engine.runner.context
        if len(ids) < 2:
            raise UserError("the text has fewer than two tokens: there is nothing to predict")
        engine = self.engine
        logprobs = []
        for start in range(0, len(ids) - 1, context - 1):
            window = ids[start : start + context]
            chunks = prompt_logprobs(engine.runner, self.tokenizer, window, engine.adapter, num_top_logprobs=0)
            for chunk in chunks:
                logprobs += [logprob for logprob, _ in chunk]
        num_bytes = sum(len(self.tokenizer.token_bytes(i)) for i in ids[1:])
        return Score(logprobs, -sum(logprobs) / math.log(2) / num_bytes)


def load(name: str | None = None, batch: int = 8, context: int | None = None) -> Model:
    """Load a model of the home folder: a base model or an adapter, BASE@NAME. Default: the one finished last.

    `batch`: completions that are computed at the same time; further ones wait. `context`: maximum number of tokens of
    a prompt with its completion; default: the model's. Both bound the memory of the KV cache.
    """
    hardware.prepare()
    folder = open_model(name)
    return Model(folder, open_engine(folder, slots=batch, slot_tokens=context))


def train(stage: str, **settings) -> dict | None:
    """Run a stage: pretrain, sft, rl or distill. `settings` are the flags of its command, with underscores.

    Returns the figures of the new model, or None if it exists already. An interrupted run resumes exactly.
    """
    if stage not in STAGES:
        raise UserError(f"unknown stage '{stage}'; choose from {', '.join(STAGES)}")
    settings_class, main = STAGES[stage]
    return main(settings_from(settings_class, settings, stage))


def settings_from(settings_class: type, values: dict, owner: str):
    """Settings with these values. Raises UserError for a name that is not a field; `owner` is named in it."""
    unknown = sorted(set(values) - {field.name for field in fields(settings_class)})
    if unknown:
        raise UserError(f"{owner} has no setting '{unknown[0]}'; docs/api.md shows where to find the list")
    return settings_class(**values)
