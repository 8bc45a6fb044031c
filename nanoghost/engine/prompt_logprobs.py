"""How probable a given text is, token by token: read once, in pieces, beside what the engine serves meanwhile."""

from collections.abc import Iterator

import torch

from nanoghost.engine.logits_processors import Likely, likely_of
from nanoghost.engine.quantized_llama import LANES
from nanoghost.engine.torch_runner import PlainRunner

PIECE = 256  # tokens read at once: their logits over a large vocabulary are what takes memory


def score(runner, ids: list[int], adapter: str, top: int) -> Iterator[list[Likely]]:
    """What was expected in place of ids[1:], a piece at a time, through the adapter of that name."""
    read = (
        plain_reader(runner, len(ids), adapter)
        if isinstance(runner, PlainRunner)
        else paged_reader(runner, len(ids), adapter)
    )
    for start in range(0, len(ids) - 1, PIECE):
        tokens = ids[start : min(start + PIECE, len(ids) - 1)]
        with torch.no_grad():
            logprobs_TV = torch.log_softmax(read(tokens, start).float(), 1)
        yield likely_of(logprobs_TV, ids[start + 1 : start + 1 + len(tokens)], top)


def plain_reader(runner: PlainRunner, count: int, adapter: str):
    model, device = runner.model, runner.model.device
    cache = model.new_cache(1, count)
    through = (
        {"adapters_B": torch.tensor([runner.names.index(adapter) if adapter else -1], device=device)}
        if runner.names
        else {}
    )

    def read(tokens: list[int], start: int) -> torch.Tensor:
        cache.select([0], torch.tensor([start], device=device))
        return model(torch.tensor([tokens], device=device), cache=cache, **through)[0]

    return read


def paged_reader(runner, count: int, adapter: str):
    model = runner.model
    pages = model.new_pages(-(-count // LANES))
    table = torch.arange(pages.size(1), dtype=torch.int32)[None]

    def read(tokens: list[int], start: int) -> torch.Tensor:
        T = len(tokens)
        positions = torch.arange(start, start + T, dtype=torch.int32)
        adapted = [(slice(0, T), model.adapters[adapter])] if adapter else ()
        rows, wanted = torch.zeros(T, dtype=torch.int32), torch.arange(T)
        return model.forward(torch.tensor(tokens), rows, positions, pages, table, wanted, adapted)

    return read
