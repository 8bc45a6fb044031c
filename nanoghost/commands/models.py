"""The verbs that look after model folders: list, show, rename, rm."""

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, model_names, open_model, write_lock


@dataclass(frozen=True)
class ListSettings:
    json: bool = False
    """Print the list as JSON on standard output."""


@dataclass(frozen=True)
class ShowSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    json: bool = False
    """Print the whole card as JSON on standard output."""


@dataclass(frozen=True)
class RenameSettings:
    model: Annotated[str, tyro.conf.Positional]
    """Name of the model."""
    new_name: Annotated[str, tyro.conf.Positional]
    """Its new name."""


@dataclass(frozen=True)
class RemoveSettings:
    model: Annotated[str, tyro.conf.Positional]
    """Name of the model."""
    yes: bool = False
    """Do not ask."""


def summary(name: str) -> dict:
    card = ModelFolder(name).card
    parent = card.parent.name if card.parent else None
    bpb = card.figures.get("bpb")
    return {"name": name, "stage": card.stage, "parent": parent, "parameters": card.parameters or None, "bpb": bpb,
            "finished": card.finished}  # fmt: skip


def adapters_of(name: str) -> list[str]:
    return [other for other in model_names() if other.startswith(f"{name}@")]


def list_command(settings: ListSettings) -> None:
    rows = [summary(name) for name in model_names()]
    if settings.json:
        print(json.dumps({"models": rows}))
        return
    table = Table("name", "stage", "from", "parameters", "finished")
    for row in rows:
        parameters = f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["finished"])) if row["finished"] else "not yet"
        table.add_row(row["name"], row["stage"], row["parent"] or "", parameters, when)
    Console(stderr=True).print(table if rows else "no models yet: `nanoghost speedrun` makes one")


def show_command(settings: ShowSettings) -> None:
    card = open_model(settings.model).card
    if settings.json:
        print(json.dumps(card.to_json()))
        return
    table = Table(show_header=False, box=None)
    for key in ("name", "stage", "parameters", "steps", "seed", "command"):
        table.add_row(key, str(getattr(card, key)))
    for key, value in card.figures.items():
        if isinstance(value, (int, float)):
            table.add_row(key, f"{value:,.4g}")
    for source in card.data:
        table.add_row("data", f"{source['name']} ({source['license']})")
    Console(stderr=True).print(table)


def existing(name: str) -> ModelFolder:
    folder = ModelFolder(name)
    if not folder.exists:
        raise UserError(f"model '{name}' is unknown; `nanoghost list` shows the names")
    return folder


def rename_command(settings: RenameSettings) -> None:
    old, new = existing(settings.model), ModelFolder(settings.new_name)
    if new.path.exists():
        raise UserError(f"model '{new.name}' exists already")
    if "@" in old.name + new.name and ("@" not in new.name or old.base != new.base):
        raise UserError(f"an adapter stays with its base: '{old.base}@' and a name")
    for adapter in adapters_of(old.name):  # a base takes its adapters along
        move(ModelFolder(adapter), ModelFolder(f"{new.name}@{adapter.partition('@')[2]}"))
    move(old, new)


def move(old: ModelFolder, new: ModelFolder) -> None:
    with write_lock(old):
        # The card first: it is what a full disk would refuse. Killed in between, the same command goes on.
        old.write_card(replace(old.card, name=new.name))
        old.path.rename(new.path)


def confirmed(what: str) -> bool:
    """Ask whether it is to be removed. Raises UserError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UserError(f"removing {what} needs --yes when nobody can be asked")
    print(f"remove {what} for good? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def remove_command(settings: RemoveSettings) -> None:
    folder = existing(settings.model)
    if adapters := adapters_of(folder.name):
        raise UserError(f"model '{folder.name}' is the base of {', '.join(adapters)}: remove these first")
    if not settings.yes and not confirmed(f"model '{folder.name}'"):
        return
    with write_lock(folder):
        (folder.path / "card.json").unlink()  # from here on it is no model, even if the rest is cut short
        shutil.rmtree(folder.path)
