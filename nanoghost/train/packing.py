"""Packing: SFT examples of different lengths share rows of a fixed length; attention never crosses from one to the
next.

R rows in a batch, T tokens in a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from nanoghost.errors import UserError
from nanoghost.progress import Display
from nanoghost.tokenizer.chat_format import REASONING_KEYS, render, truncate_oldest_turns

MAX_LINES = 5  # of a list for the user
BUILT_IN = "a built-in conversation"


@dataclass
class TokenizedExample:
    """A tokenized conversation or row of text."""

    ids: list[int]
    """Token ids."""
    loss_mask: list[bool]
    """Whether each token contributes to the loss (the first never does: nothing precedes it)."""


@dataclass
class Omissions:
    """What conversations lost when they became examples. A conversation is named by its place, as FILE:LINE."""

    dropped: list[str] = field(default_factory=list)
    """"PLACE: reason" for each conversation that is left out."""
    without_oldest: list[str] = field(default_factory=list)
    """Places of those that are longer than the context, and are learned without their oldest turns."""
    cut: list[str] = field(default_factory=list)
    """Places of those whose last turn alone is longer than the context, and is learned up to there."""
    without_reasoning: list[str] = field(default_factory=list)
    """Places of those with reasoning next to the content, which the model's chat format does not write."""


def tokenize_conversations(
    conversations: list[list[dict]], tokenizer, context: int
) -> tuple[list[TokenizedExample], Omissions]:
    """(examples, what they do not contain).

    A conversation longer than `context` loses its oldest turns. If its last turn alone is too long, the end of that
    turn is cut off, and with it the stop token. A conversation is left out if then no token is in the loss, so that no
    row consists of padding, and if the model's chat template rejects it, as the server would.
    """
    examples, omissions = [], Omissions()
    for messages in conversations:
        try:
            example, is_whole = tokenize_conversation(messages, tokenizer, context)
        except UserError as error:
            omissions.dropped.append(f"{name_of(messages)}: {error}")
            continue
        if any(example.loss_mask[1:context]):
            examples.append(TokenizedExample(example.ids[:context], example.loss_mask[:context]))
            if any(example.loss_mask[context:]):
                omissions.cut.append(name_of(messages))
            elif not is_whole:
                omissions.without_oldest.append(name_of(messages))
            if loses_reasoning(messages, tokenizer):
                omissions.without_reasoning.append(name_of(messages))
        elif any(example.loss_mask):
            omissions.dropped.append(f"{name_of(messages)}: no answer within a context of {context} tokens")
        elif any(message["role"] == "assistant" for message in messages):
            reason = "the model's chat template does not write its answers as they are"
            omissions.dropped.append(f"{name_of(messages)}: {reason}")
        else:
            omissions.dropped.append(f"{name_of(messages)}: it has no assistant message")
    if not examples:
        example = "".join(f"; {line}" for line in omissions.dropped[:1])
        raise UserError(f"none of the {len(conversations)} conversations has an answer to learn{example}")
    return examples, omissions


def tokenize_conversation(messages: list[dict], tokenizer, context: int) -> tuple[TokenizedExample, bool]:
    """(example without the oldest turns, if the conversation is longer than `context`; whether it has all turns)."""
    example = TokenizedExample(*render(messages, tokenizer))
    if len(example.ids) <= context:
        return example, True
    newest = truncate_oldest_turns(messages, tokenizer, context)
    return TokenizedExample(*render(newest, tokenizer)), len(newest) == len(messages)


def loses_reasoning(messages: list[dict], tokenizer) -> bool:
    """Whether the conversation has reasoning that is not among its tokens."""
    without = [{key: value for key, value in m.items() if key not in REASONING_KEYS} for m in messages]
    has_reasoning = any(message.get(key) for message in messages for key in REASONING_KEYS)
    return has_reasoning and render(messages, tokenizer) == render(without, tokenizer)


def name_of(messages: list[dict]) -> str:
    """Where a conversation comes from, for messages to the user."""
    return getattr(messages, "where", BUILT_IN)


def report_omissions(omissions: Omissions, num_conversations: int, context: int, display: Display) -> None:
    """Say how many conversations are not learned as a whole, and name the first of them."""
    report_dropped(omissions.dropped, num_conversations, display)
    too_long = f"which the context of {context} tokens does not hold"
    losses = {
        f"their oldest turns, {too_long}": omissions.without_oldest,
        f"the end of their last turn, {too_long}": omissions.cut,
        "their reasoning, which the model's chat format does not write; it learns <think> text in 'content'": (
            omissions.without_reasoning
        ),
    }
    for loss, places in losses.items():
        if places:
            example = "".join(f" (the first: {place})" for place in places[:1] if place != BUILT_IN)
            display.print(f"{len(places)} of {num_conversations} conversations lose {loss}{example}")


def report_dropped(dropped: list[str], num_conversations: int, display: Display) -> None:
    """Name the first of the conversations that are left out."""
    if not dropped:
        return
    display.print(f"{len(dropped)} of {num_conversations} conversations are left out:")
    for line in dropped[:MAX_LINES]:
        display.print(f"  {line}")
    if len(dropped) > MAX_LINES:
        display.print(f"  and {len(dropped) - MAX_LINES} more")


def pack(lengths: list[int], capacity: int, order: Iterable[int], max_open_rows: int = 32) -> list[list[int]]:
    """Best-fit packing: rows of indices whose lengths sum to at most `capacity`. Each index goes into the open row
    where it leaves the least room."""
    rows = []
    open_rows: list[tuple[int, list[int]]] = []  # (room, indices)
    for index in order:
        length = lengths[index]
        fitting = [position for position, (room, _) in enumerate(open_rows) if room >= length]
        if fitting:
            best = min(fitting, key=lambda position: open_rows[position][0])
            room, indices = open_rows[best]
            open_rows[best] = (room - length, [*indices, index])
            continue
        open_rows.append((capacity - length, [index]))
        if len(open_rows) > max_open_rows:
            fullest = min(range(len(open_rows)), key=lambda position: open_rows[position][0])
            rows.append(open_rows.pop(fullest)[1])
    return rows + [indices for _, indices in open_rows]


class PackedBatches:
    """Batches of packed rows: a pure function of (seed, epoch, position), the same for any number of processes."""

    def __init__(
        self, examples: list[TokenizedExample], context: int, rows: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        """`rows`: number of rows in a step, over all processes."""
        self.examples, self.context, self.rows_per_step, self.seed = examples, context, rows, seed
        self.rank, self.world_size = rank, world_size
        self.lengths = [len(example.ids) for example in examples]
        self.epochs: list[list[list[int]]] = []  # rows of each epoch, packed when they are needed
        self.first_rows = [0]  # number of the first row of each epoch

    def row(self, number: int) -> list[int]:
        """Indices of the examples in row `number`, counted over all epochs."""
        while number >= self.first_rows[-1]:
            epoch = len(self.epochs)
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples)).tolist()
            self.epochs.append(pack(self.lengths, self.context + 1, order))
            self.first_rows.append(self.first_rows[-1] + len(self.epochs[epoch]))
        epoch = next(e for e in range(len(self.epochs)) if number < self.first_rows[e + 1])
        return self.epochs[epoch][number - self.first_rows[epoch]]

    def rows_in_first_epoch(self) -> int:
        self.row(0)  # packs the first epoch
        return self.first_rows[1]

    def rows_at(self, step: int) -> tuple[list[list[int]], int]:
        """(example indices in each row of this process, number of tokens in the loss over all processes)."""
        all_rows = [self.row(number) for number in range(step * self.rows_per_step, (step + 1) * self.rows_per_step)]
        loss_tokens = sum(sum(self.examples[i].loss_mask) for row in all_rows for i in row)
        return all_rows[self.rank :: self.world_size], loss_tokens

    def at(self, step: int):
        """inputs, targets, weights, segments, each (R, T): this process's rows.

        The weights of the tokens in the loss are equal and sum to 1 over the rows of all processes; the others are 0.
        """
        rows, loss_tokens = self.rows_at(step)
        return collate(rows, self.examples, self.context, loss_tokens)


def collate(rows: list[list[int]], examples: list[TokenizedExample], context: int, loss_tokens: int):
    """inputs, targets, weights, segments of packed rows, each (R, T).

    weights: 1 / `loss_tokens` for targets in the loss, else 0. segments: which example of its row a token belongs to,
    from 1; 0 is padding.
    """
    R, T = len(rows), context
    ids = np.zeros((R, T + 1), np.int64)
    segments = np.zeros((R, T + 1), np.int64)
    weights = np.zeros((R, T + 1), np.float32)
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, 1):
            end = start + len(examples[i].ids)
            ids[r, start:end] = examples[i].ids
            segments[r, start:end] = segment
            weights[r, start:end] = examples[i].loss_mask
            start = end
    weights /= np.float32(loss_tokens)
    ids, segments, weights = torch.from_numpy(ids), torch.from_numpy(segments), torch.from_numpy(weights)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:], segments[:, :-1]
