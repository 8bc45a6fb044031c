"""The three kinds of distillation. Each prepares its data and has `forward_backward(model, step) -> (loss, tokens)`.

`settings` is the `DistillSettings` of distill.py.
"""

import random

import numpy as np
import torch

from nanoghost import distributed, hardware
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.formats.model_card import ModelCard
from nanoghost.progress import Display
from nanoghost.tasks.sft_mix import builtin_conversations
from nanoghost.tokenizer.chat_format import render
from nanoghost.train.distill_loss import distill_loss, student_bucket_logprobs
from nanoghost.train.packing import (
    PackedBatches,
    TokenizedExample,
    collate,
    name_of,
    pack,
    report_dropped,
    report_omissions,
    tokenize_conversations,
)
from nanoghost.train.run import Run
from nanoghost.train.settings import sampling_seed
from nanoghost.train.sft import accumulate_packed_gradients
from nanoghost.train.teacher_cache import (
    Teacher,
    micro_batches,
    teacher_answers,
    teacher_probabilities,
    teacher_targets,
)

# -- examples: a list of conversations, or of rows of text ------------------------------------------------------------


def text_rows(tokens, context: int, max_rows: int, check=None) -> list[TokenizedExample]:
    """Up to `max_rows` evenly spaced rows of `context` + 1 tokens; `check` compares the file with its checksums."""
    available = (len(tokens) - 1) // context
    if not available:
        raise UserError(
            f"the text has {len(tokens)} tokens, too few for one row of {context} + 1: choose a smaller --context"
        )
    count = min(max_rows, available)
    starts = [i * available // count * context for i in range(count)]
    if check:
        check(np.array(starts), context + 1)
    loss_mask = [False] + [True] * context
    return [TokenizedExample(tokens[start : start + context + 1].tolist(), loss_mask) for start in starts]


def sample_conversations(settings, conversations: list[list[dict]], root: ModelCard) -> list[list[dict]]:
    """Up to `settings.examples` of the given conversations, and as many of the built-in mix."""
    sample = random.Random(0).sample(conversations, min(settings.examples, len(conversations)))
    return sample + builtin_conversations(settings.data, root, settings.name, settings.examples, settings.seed)


def prompts_of(conversations: list[list[dict]], tokenizer, display: Display) -> list[list[dict]]:
    """Each conversation up to its last user message. Names those that have none, or that the chat template rejects."""
    prompts, dropped = [], []
    for messages in conversations:
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        if last < 0:
            dropped.append(f"{name_of(messages)}: it has no user message to answer")
            continue
        try:
            render(messages[: last + 1], tokenizer, add_generation_prompt=True)
            prompts.append(messages[: last + 1])
        except UserError as error:
            dropped.append(f"{name_of(messages)}: {error}")
    report_dropped(dropped, len(conversations), display)
    if not prompts:
        raise UserError("no conversation has a user message to answer" + "".join(f"; {line}" for line in dropped[:1]))
    return prompts


# -- the methods ------------------------------------------------------------------------------------------------------


class SequenceDistillation:
    """SFT on the teacher's answers (Kim and Rush 2016)."""

    def __init__(self, settings, conversations, tokenizer, context: int, teacher: Teacher, run: Run):
        prompts = prompts_of(conversations, teacher.tokenizer, run.display)
        answered = teacher_answers(settings, prompts, teacher, run)
        examples, omissions = tokenize_conversations(answered, tokenizer, context)
        report_omissions(omissions, len(answered), context, run.display)
        self.tokens_per_step = settings.batch * context
        self.batches = PackedBatches(
            examples, context, settings.batch, settings.seed, *distributed.rank_and_world_size()
        )

    def forward_backward(self, model, step: int) -> tuple[float, int]:
        return accumulate_packed_gradients(model, self.batches.at(step), self.batches.world_size), self.tokens_per_step


class TokenDistillation:
    """The teacher's probabilities of given text or conversations (Hinton et al. 2015)."""

    def __init__(self, settings, examples, tokenizer, context: int, teacher: Teacher, run: Run):
        if not isinstance(examples[0], TokenizedExample):
            conversations = examples
            examples, omissions = tokenize_conversations(conversations, tokenizer, context)
            report_omissions(omissions, len(conversations), context, run.display)
        self.examples, self.context, self.settings = examples, context, settings
        self.targets = teacher_probabilities(settings, examples, context, tokenizer.vocab_size, teacher, run)
        self.batches = PackedBatches(
            examples, context, settings.batch, settings.seed, *distributed.rank_and_world_size()
        )

    def forward_backward(self, model, step: int) -> tuple[float, int]:
        rows, loss_tokens = self.batches.rows_at(step)
        batch = collate(rows, self.examples, self.context, loss_tokens)
        example_targets = [self.targets[i] for row in rows for i in row]
        ids, logprobs = zip(*example_targets)
        targets = torch.cat(ids), torch.cat(logprobs)
        loss = accumulate_distill_gradients(
            model, batch, targets, self.settings.beta or 0.0, self.settings.teacher_weight
        )
        return loss, self.settings.batch * self.context


class OnPolicyDistillation:
    """The teacher's probabilities of what the student samples (Agarwal et al. 2024, GKD)."""

    def __init__(self, settings, examples, tokenizer, context: int, teacher: Teacher, run: Run):
        self.settings, self.tokenizer, self.context = settings, tokenizer, context
        if isinstance(examples[0], TokenizedExample):
            # The first quarter of a row is the prompt; the student continues it.
            prompts = [row.ids[: context // 4] for row in examples]
        else:
            questions = prompts_of(examples, tokenizer, run.display)
            prompts = [render(question, tokenizer, add_generation_prompt=True)[0] for question in questions]
        self.prompts = [ids for ids in prompts if len(ids) + settings.max_tokens <= context]
        if not self.prompts:
            raise UserError(f"no prompt leaves room for {settings.max_tokens} tokens in a context of {context}")
        self.teacher_model, _ = teacher.load()
        self.beta = 1.0 if settings.beta is None else settings.beta
        self.temperature = 1.0 if settings.temperature is None else settings.temperature

    def forward_backward(self, model, step: int) -> tuple[float, int]:
        settings, (rank, world_size) = self.settings, distributed.rank_and_world_size()
        prompts = random.Random(f"{settings.seed}-{step}").choices(self.prompts, k=settings.batch)[rank::world_size]
        seed = sampling_seed(settings.seed, step)
        sampling = SamplingParams(settings.max_tokens, self.temperature, seed=seed, constrain_calls=False)
        sequences = generate(model, self.tokenizer, prompts, sampling, rank=rank, world_size=world_size)
        examples = [TokenizedExample(s.token_ids, [False] * len(s.prompt_ids) + s.sampled_mask) for s in sequences]
        rows = pack([len(example.ids) for example in examples], self.context + 1, range(len(examples)))
        sampled_tokens = sum(sum(sequence.sampled_mask) for sequence in sequences)
        all_tokens = sum(len(example.ids) for example in examples)
        counts = distributed.all_gather_object((sampled_tokens, all_tokens))  # of all processes
        batch = collate(rows, examples, self.context, loss_tokens=sum(sampled for sampled, _ in counts))
        targets = teacher_targets(self.teacher_model, batch, settings.top_k, self.tokenizer.vocab_size)
        loss = accumulate_distill_gradients(model, batch, targets, self.beta, teacher_weight=1.0)
        return loss, sum(tokens for _, tokens in counts)


METHODS = {"sequence": SequenceDistillation, "token": TokenDistillation, "on-policy": OnPolicyDistillation}


def accumulate_distill_gradients(model, batch, targets, beta: float, teacher_weight: float) -> float:
    """Add the gradients of this process's part of the loss over a packed batch; returns this part times the world size.

    `targets`: ids (N, K) and log P of the buckets (N, K + 1) of the teacher, at each token in the loss.
    """
    _, world_size = distributed.rank_and_world_size()
    total, start = 0.0, 0
    for inputs, next_tokens, weights, segments in micro_batches(batch, model):
        in_loss = (weights > 0).nonzero(as_tuple=True)
        end = start + len(in_loss[0])
        ids_NK, teacher_NB = (tensor[start:end].to(hardware.device()) for tensor in targets)
        start = end
        student_NB = student_bucket_logprobs(model, inputs, ids_NK, segments, in_loss)
        loss_N = distill_loss(student_NB, teacher_NB, ids_NK, next_tokens[in_loss], beta, teacher_weight)
        loss = (loss_N * weights[in_loss]).sum() * world_size  # the optimizer averages gradients over processes
        loss.backward()
        total += loss.item()
    return total
