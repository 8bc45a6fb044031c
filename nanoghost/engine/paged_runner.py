"""A packed Llama behind the engine: keys and values in pages of 16 tokens, shared by all who begin with the same text.

A full page is known by its tokens and by the page before it, and the first by whose it is, so a chain of pages stands for
one beginning exactly. Who comes with the same beginning, the next turn of a conversation or another with the same system
text, finds it read already. Pages that nobody uses are kept until the room is needed, the one that rested longest goes first.
"""

from collections import OrderedDict, deque
from itertools import count
from pathlib import Path

import torch

from nanoghost.engine.quantized_llama import LANES as PAGE
from nanoghost.engine.quantized_llama import PackedLlama, load_packed, pack_module, packable
from nanoghost.formats.peft import read_adapter
from nanoghost.model.llama import Llama

ALIKE = 3  # tokens that must recur before what followed them is expected again
FEW = 4  # rows among which guessing pays: with more, arithmetic and not memory is what is short


class PagedRunner:
    chunk = 512  # tokens read in a step by those who have many
    drafts = True

    def __init__(self, model: PackedLlama, tokens: int, seats: int = 64):
        """`tokens`: how many the pages hold in all."""
        pages = -(-tokens // PAGE)
        self.model, self.context = model, min(model.config.context, pages * PAGE)
        self.cache = model.new_pages(pages)
        self.resting: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        """Pages that nobody uses, the longest rested first."""
        self.users = [0] * pages
        self.known: dict[tuple, int] = {}
        """(what the page before stands for, its tokens) -> page."""
        self.stands_for: list[tuple | None] = [None] * pages
        """(key in `known`, number): what a full page stands for; numbers are never used again."""
        self.numbers = count(1)
        self.table = torch.zeros(seats, -(-self.context // PAGE), dtype=torch.int32)
        self.seats = deque(range(seats))
        self.rows: dict[int, Seat] = {}

    def open(self, row) -> bool:
        """Let a row in, if there are a seat and pages for all it may come to read; `row.read` says what was read already."""
        chain, shared = (row.adapter, row.owner), []
        for start in range(0, len(row.prompt) - PAGE, PAGE):  # the last token is always read: its logits are wanted
            page = self.known.get((chain, tuple(row.unread[start : start + PAGE])))
            if page is None:
                break
            shared.append(page)
            chain = self.stands_for[page][1]
        if not self.admit(row, shared):
            return False
        row.read = len(shared) * PAGE
        return True

    def admit(self, row, shared: list[int]) -> bool:
        new = -(-row.limit // PAGE) - len(shared)
        if not self.seats or new > len(self.resting) - sum(page in self.resting for page in shared):
            return False
        for page in shared:
            self.users[page] += 1
            self.resting.pop(page, None)
        fresh = [self.resting.popitem(last=False)[0] for _ in range(new)]
        for page in fresh:
            self.users[page] = 1
            if self.stands_for[page]:
                del self.known[self.stands_for[page][0]]
                self.stands_for[page] = None
        seat = self.seats.popleft()
        self.rows[id(row)] = Seat(seat, shared + fresh, len(shared))
        self.table[seat, : len(shared) + new] = torch.tensor(shared + fresh, dtype=torch.int32)
        return True

    def fork(self, row, others: list) -> int:
        """Seat `others` with what `row` has read, full pages shared; returns how many found room."""
        if not others:
            return 0
        self.remember(row)
        own, full = self.rows[id(row)].pages, row.read // PAGE
        for i, other in enumerate(others):
            if not self.admit(other, own[:full]):
                return i
            if row.read % PAGE:
                self.cache[:, self.rows[id(other)].pages[full]] = self.cache[:, own[full]]
        return len(others)

    def remember(self, row) -> None:
        """From now on the pages that a row has filled are known."""
        seat = self.rows[id(row)]
        tokens = row.tokens if row.read // PAGE > seat.known else ()
        for i in range(seat.known, row.read // PAGE):
            chain = self.stands_for[seat.pages[i - 1]][1] if i else (row.adapter, row.owner)
            key = (chain, tuple(tokens[i * PAGE : (i + 1) * PAGE]))
            if key in self.known:  # somebody wrote the same at the same time: go on with theirs, it is the same
                page = self.known[key]
                self.users[page] += 1
                self.resting.pop(page, None)
                self.leave(seat.pages[i])
                seat.pages[i] = page
                self.table[seat.number, i] = page
            else:
                self.known[key] = seat.pages[i]
                self.stands_for[seat.pages[i]] = (key, next(self.numbers))
        seat.known = row.read // PAGE

    def leave(self, page: int) -> None:
        self.users[page] -= 1
        if not self.users[page]:
            self.resting[page] = None

    def add_adapter(self, folder: Path, name: str = "") -> None:
        """From here on rows may go through the adapter of this folder, by this name or its path."""
        self.model.adapters[name or str(folder)] = read_adapter(folder, self.model.config, torch.float32)

    def close(self, row) -> None:
        self.remember(row)
        seat = self.rows.pop(id(row))
        for page in reversed(seat.pages):  # the end of a text is of less use than its beginning
            self.leave(page)
        self.seats.append(seat.number)

    def guess(self, row) -> list[int]:
        """What followed the last few tokens where they stood before (prompt lookup): often right where a text repeats itself."""
        if len(self.rows) > FEW:
            return []
        tokens = row.tokens
        for i in range(row.indexed, len(tokens) - ALIKE):
            row.after[tuple(tokens[i : i + ALIKE])] = i + ALIKE
        row.indexed = max(0, len(tokens) - ALIKE)
        at = row.after.get(tuple(tokens[-ALIKE:]), len(tokens))
        return tokens[at : at + min(row.trust, row.limit - len(tokens))]

    def run(self, batch: list) -> torch.Tensor:
        """Logits (wanted, V) of the readings, in order."""
        tokens, seats, positions, wanted, adapted = [], [], [], [], []
        for reading in batch:
            row, n = reading.row, len(reading.tokens)
            self.remember(row)
            if row.adapter:
                first, adapter = len(tokens), self.model.adapters[row.adapter]
                if adapted and adapted[-1][0].stop == first and adapted[-1][1] is adapter:  # one product for neighbours
                    first = adapted.pop()[0].start
                adapted.append((slice(first, len(tokens) + n), adapter))
            tokens += reading.tokens
            seats += [self.rows[id(row)].number] * n
            positions += range(row.read, row.read + n)
            wanted += range(len(tokens) - reading.wanted, len(tokens))
        seats, positions = (torch.tensor(x, dtype=torch.int32) for x in (seats, positions))
        tokens, wanted = (torch.tensor(x, dtype=torch.long) for x in (tokens, wanted))
        return self.model.forward(tokens, seats, positions, self.cache, self.table, wanted, adapted)


class Seat:
    """Where a row sits: its line of the table, its pages, and how many of them are known."""

    def __init__(self, number: int, pages: list[int], known: int):
        self.number, self.pages, self.known = number, pages, known


def open_paged(base: Path, config, seats: int, room: int) -> PagedRunner | None:
    """A model folder with `seats` of `room` tokens; None where it cannot be packed."""
    if not packable(config):
        return None
    return PagedRunner(load_packed(base), seats * -(-room // PAGE) * PAGE, seats)


def paged(model: Llama, seats: int, capacity: int) -> PagedRunner | None:
    """A model being trained, as it is at this moment, in bf16; None where it cannot be packed."""
    if not packable(model.config):
        return None
    return PagedRunner(pack_module(model, 16), seats * (min(capacity, model.config.context) + PAGE), seats)
