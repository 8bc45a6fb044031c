"""What every `nanoghost bench` shares: natural text, the limits of the machine, and a table of medians.

Contenders are measured in turn, so that a slow moment of the machine meets all of them, and a figure is the median of
its rounds.
"""

import importlib.util
import json
import statistics
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.data.registry import open_source
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder

PEERS = {"transformers": "transformers", "llama.cpp": "llama_cpp", "trl": "trl"}  # and their modules


def texts(tokenizer, count: int, tokens: int) -> list[list[int]]:
    """`count` different pieces of the validation plays, all as long."""
    ids = [i for d in open_source("plays").documents() if d.split == "val" for i in tokenizer.encode(d.text)]
    if count * tokens > len(ids):
        raise UserError(f"{count} texts of {tokens} tokens are more than the validation plays have ({len(ids)})")
    return [ids[i * tokens : (i + 1) * tokens] for i in range(count)]


def limits() -> dict:
    dtype = hardware.compute_dtype()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_gflops_per_second": round(hardware.matmul_gflops_per_second(dtype), 1),
        "bandwidth_gb_per_second": round(hardware.bandwidth_gb_per_second(), 1),
    }


def peers(against: str, folder: ModelFolder, known, beside=()) -> list[str]:
    """The peers that are asked for, of those that can be; they and the modules `beside` must be there, and able to run the model."""
    asked = [name for name in against.split(",") if name]
    if asked and (folder.card.arch == "ghost" or "@" in folder.name):
        raise UserError(f"'{folder.name}' runs only here: --against is for whole models of the Llama family")
    for name in asked:
        if name not in known:
            raise UserError(f"--against knows {' and '.join(known)}, not '{name}'")
        for module in (PEERS[name], *beside):
            if not importlib.util.find_spec(module):
                raise UserError(
                    f"{module} is not installed: pip install 'nanoghost[{'trl' if name == 'trl' else 'parity'}]'"
                )
    return asked


def tell(
    settings, measured: dict, works: list, limit: Callable[[str, int], float] | None, unit: str = "tokens/s"
) -> list[dict]:
    """Run everything in turn, once to warm up, and print medians, beside the limits of (work, streams) where these are known; the rows of that table."""
    rates = [[] for _ in works]
    for i in range(settings.rounds + 1):
        for found, (_, _, _, run) in zip(rates, works):
            rate = run()
            found += [rate] if i else []
    key = unit.replace("/s", "_per_second").replace("/min", "_per_minute")
    columns = {"at once": "streams", unit: key, "from": "lowest", "to": "highest"}
    columns |= {"limit": "limit", "share": "share"} if limit else {}
    rows = []
    for (engine, work, streams, _), found in zip(works, rates):
        rate = statistics.median(found)
        row = {"engine": engine, "work": work, "streams": streams, key: round(rate, 1)}
        row |= {"lowest": round(min(found), 1), "highest": round(max(found), 1)}
        if limit:
            most = limit(work, streams)
            row |= {"limit": round(most, 1), "share": round(rate / most, 3)}
        rows.append(row)
    table = Table("engine", "work")
    for column in columns:
        table.add_column(column, justify="right")
    for r in rows:
        figures = (f"{r[k]:.0%}" if k == "share" else f"{r[k]:,.0f}" for k in columns.values())
        table.add_row(r["engine"], r["work"], *figures)
    Console(stderr=True).print(table)
    if limit:
        gflops, bandwidth = measured["matrix_gflops_per_second"], measured["bandwidth_gb_per_second"]
        Console(stderr=True).print(
            f"limits: {gflops:.0f} GFLOP/s in {measured['dtype']}, twice that in 8 bits; {bandwidth:.0f} GB/s"
        )
    if settings.json:
        print(json.dumps({"limits": measured, "rows": rows}))
    return rows
