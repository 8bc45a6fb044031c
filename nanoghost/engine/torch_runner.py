"""Any model, as PyTorch has it, behind the engine: a seat for each row, with room in the cache for the longest.

Rows that read one token are one batch over the seats from the first to the last one taken; rows that read more are another.
"""

import torch


class PlainRunner:
    chunk = 4096  # tokens read in a step by those who have many
    drafts = False
    """Whether reading a few tokens costs little more than reading one."""

    def __init__(self, model, seats: int, capacity: int):
        self.model, self.context = model, min(model.config.context, capacity)
        self.cache = model.new_cache(seats, capacity)
        self.seats: list = [None] * seats
        """Who sits where."""
        self.names: list[str] = []
        """Of the model's adapters, that rows ask for."""

    def add_adapter(self, folder, name: str = "") -> None:
        """From here on rows may go through the adapter of this folder, by this name or its path."""
        from nanoghost.formats.peft import read_adapter

        self.model.adapters = [*self.model.adapters, read_adapter(folder, self.model.config, self.model.dtype)]
        self.names.append(name or str(folder))

    def open(self, row) -> bool:
        """Give a row a seat, if there is one."""
        if None not in self.seats:
            return False
        self.seats[self.seats.index(None)] = row
        return True

    def fork(self, row, others: list) -> int:
        """Seat `others` with what `row` has read; returns how many found a seat."""
        free = [i for i, taken in enumerate(self.seats) if taken is None][: len(others)] if others else []
        for seat, other in zip(free, others):
            self.seats[seat] = other
        self.cache.copy_rows([self.seats.index(row)] * len(free), free, row.read)
        return len(free)

    def close(self, row) -> None:
        self.seats[self.seats.index(row)] = None

    def run(self, batch: list) -> torch.Tensor:
        """Logits (B, V) of the readings that want them, in order; readings of one token stand in front."""
        self.move_up()
        seat_of = {id(row): seat for seat, row in enumerate(self.seats) if row is not None}
        one = [r for r in batch if len(r.tokens) == 1]
        many = batch[len(one) :]
        logits = []
        if one:
            seats = [seat_of[id(r.row)] for r in one]
            tokens = [[0]] * (max(seats) + 1)
            for seat, r in zip(seats, one):
                tokens[seat] = r.tokens
            starts = [row.read if row else 0 for row in self.seats[: len(tokens)]]  # who reads nothing now writes ahead
            out_BV = self.forward(tokens, starts, None, [0] * len(tokens), self.seats[: len(tokens)])
            logits.append(out_BV if seats == list(range(len(out_BV))) else out_BV[seats])
        if many:
            longest = max(len(r.tokens) for r in many)
            tokens = [r.tokens + [0] * (longest - len(r.tokens)) for r in many]
            seats = [seat_of[id(r.row)] for r in many]
            rows = [r.row for r in many]
            out_BV = self.forward(tokens, [row.read for row in rows], seats, [len(r.tokens) - 1 for r in many], rows)
            logits.append(out_BV[[i for i, r in enumerate(many) if r.wanted]])
        return torch.cat(logits)

    def forward(self, tokens, starts, seats, last, rows) -> torch.Tensor:
        device = self.model.device
        tokens, starts, last = (torch.tensor(x, device=device) for x in (tokens, starts, last))
        self.cache.select(seats, starts)
        if not self.names:
            return self.model(tokens, cache=self.cache, last_B=last)[:, 0]
        through = [self.names.index(row.adapter) if row and row.adapter else -1 for row in rows]
        return self.model(tokens, cache=self.cache, last_B=last, adapters_B=torch.tensor(through, device=device))[:, 0]

    def move_up(self) -> None:
        """If many seats are idle, let those at the end move to the front: computing idle ones costs more."""
        taken = [i for i, row in enumerate(self.seats) if row is not None]
        if taken and len(taken) <= 0.7 * (taken[-1] + 1):
            free = [i for i in range(len(taken)) if self.seats[i] is None]
            movers = taken[len(taken) - len(free) :]
            self.cache.copy_rows(movers, free, max(self.seats[i].read for i in movers))
            for old, new in zip(movers, free):
                self.seats[old], self.seats[new] = None, self.seats[old]
