"""Packing: conversations of all lengths into rows of one length, none of which can see another.

R rows in a batch, T tokens in a row.
"""

from dataclasses import dataclass

import numpy as np
import torch

from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import render, shortened


@dataclass
class Lesson:
    """A tokenised conversation: ids, and which of them are learned (never the first, which nothing precedes)."""

    ids: list[int]
    learned: list[bool]


def lessons_from(conversations: list[list[dict]], tokenizer, context: int) -> tuple[list[Lesson], int]:
    """(lessons, how many conversations were left out).

    A conversation longer than `context` loses its oldest turns; if its last turn alone is too long it is cut at the
    end, so the answer is learned as far as it fits and its end mark is not. One without a learned token left, after
    that, is left out: a row never holds only padding.
    """
    lessons = []
    for messages in conversations:
        ids, learned = render(messages, tokenizer)
        if len(ids) > context:
            ids, learned = render(shortened(messages, tokenizer, context), tokenizer)
        lesson = Lesson(ids[:context], learned[:context])
        if any(lesson.learned[1:]):
            lessons.append(lesson)
    if not lessons:
        raise UserError(
            f"none of the {len(conversations)} conversations has an assistant's answer within a context of {context} tokens"
        )
    return lessons, len(conversations) - len(lessons)


def pack(lengths: list[int], capacity: int, order, open_rows: int = 32) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `capacity`: each goes where it leaves the least room (best fit)."""
    rows, unfinished = [], []  # unfinished: [room, indices]
    for i in order:
        fitting = [u for u in unfinished if u[0] >= lengths[i]]
        if fitting:
            best = min(fitting, key=lambda u: u[0])
            best[0] -= lengths[i]
            best[1].append(i)
        else:
            unfinished.append([capacity - lengths[i], [i]])
            if len(unfinished) > open_rows:
                fullest = min(unfinished, key=lambda u: u[0])
                unfinished.remove(fullest)
                rows.append(fullest[1])
    return rows + [indices for _, indices in unfinished]


class PackedBatches:
    """Batches of packed rows; a pure function of (seed, epoch, position), the same for any number of processes."""

    def __init__(self, lessons: list[Lesson], context: int, rows: int, seed: int, rank: int = 0, world: int = 1):
        self.lessons, self.context, self.rows, self.seed = lessons, context, rows, seed
        self.rank, self.world = rank, world
        self.lengths = [len(lesson.ids) for lesson in lessons]
        self.epochs: dict[int, list[list[int]]] = {}
        self.starts = [0]  # number of the first row of each epoch

    def row(self, number: int) -> list[int]:
        """Which lessons row `number` (counted over all epochs) holds."""
        while number >= self.starts[-1]:
            epoch = len(self.starts) - 1
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lessons)).tolist()
            self.epochs[epoch] = pack(self.lengths, self.context + 1, order)
            self.starts.append(self.starts[-1] + len(self.epochs[epoch]))
        epoch = next(e for e in range(len(self.starts) - 1) if number < self.starts[e + 1])
        return self.epochs[epoch][number - self.starts[epoch]]

    def rows_at(self, step: int) -> tuple[list[list[int]], int]:
        """Which lessons the rows of this process hold, and how many tokens are learned in the rows of all."""
        all_rows = [self.row(n) for n in range(step * self.rows, (step + 1) * self.rows)]
        learned = sum(sum(self.lessons[i].learned) for row in all_rows for i in row)
        return all_rows[self.rank :: self.world], learned

    def at(self, step: int):
        """inputs, targets, weights, segments, each (R, T): this process's rows.

        Weights are the shares of the tokens in the loss: equal where a token is learned, 0 elsewhere; they sum to 1 over
        the rows of all processes.
        """
        own, learned = self.rows_at(step)
        return fill(own, self.lessons, self.context, learned)


def fill(rows: list[list[int]], lessons: list[Lesson], context: int, learned: int):
    """inputs, targets, weights (1 / `learned` where a token is learned), segments of rows of lessons, each (R, T)."""
    R, T = len(rows), context
    ids, segments = np.zeros((R, T + 1), np.int64), np.zeros((R, T + 1), np.int64)
    weights = np.zeros((R, T + 1), np.float32)
    for r, row in enumerate(rows):
        at = 0
        for number, i in enumerate(row):
            end = at + len(lessons[i].ids)
            ids[r, at:end], segments[r, at:end] = lessons[i].ids, number + 1
            weights[r, at:end] = lessons[i].learned
            weights[r, at:end] /= learned
            at = end
    ids, segments, weights = map(torch.from_numpy, (ids, segments, weights))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:], segments[:, :-1]
