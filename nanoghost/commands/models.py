"""Commands for model folders: list, show, rename, rm."""

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost.commands.arguments import ModelArgument
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, model_names, open_model, write_lock
from nanoghost.progress import JsonFlag


@dataclass(frozen=True)
class ListSettings(JsonFlag):
    pass


@dataclass(frozen=True)
class ShowSettings(ModelArgument, JsonFlag):
    pass


@dataclass(frozen=True)
class RenameSettings:
    model: Annotated[str, tyro.conf.Positional]
    """Name of the model."""
    new_name: Annotated[str, tyro.conf.Positional]
    """New name."""


@dataclass(frozen=True)
class RemoveSettings:
    model: Annotated[str, tyro.conf.Positional]
    """Name of the model."""
    yes: bool = False
    """Do not ask for confirmation."""


def model_row(name: str) -> dict:
    """What `nanoghost list` shows about a model."""
    try:
        card = ModelFolder(name).card
    except (UserError, OSError) as error:  # damaged, or of another format
        return {"name": name, "error": str(error)}
    return {
        "name": name,
        "stage": card.stage,
        "parent": card.parent.name if card.parent else None,
        "parameters": card.parameters or None,
        "bpb": card.figures.get("bpb"),
        "finished": card.finished,
    }


def adapters_of(name: str) -> list[str]:
    return [other for other in model_names() if other.startswith(f"{name}@")]


def list_command(settings: ListSettings) -> None:
    rows = [model_row(name) for name in model_names()]
    if settings.json:
        print(json.dumps({"models": rows}))
        return
    table = Table("name", "stage", "parent", "parameters", "finished")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], "", "", "", "unreadable")
            print(f"nanoghost: {row['error']}", file=sys.stderr)
            continue
        parameters = f"{row['parameters'] / 1e6:.1f}M" if row["parameters"] else ""
        finished = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["finished"])) if row["finished"] else "not yet"
        table.add_row(row["name"], row["stage"], row["parent"] or "", parameters, finished)
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


def existing_folder(name: str) -> ModelFolder:
    """The folder of a model, finished or not. Raises UserError if there is none."""
    folder = ModelFolder(name)
    if not folder.exists:
        raise UserError(f"model '{name}' does not exist; `nanoghost list` lists all models")
    return folder


def rename_command(settings: RenameSettings) -> None:
    old = existing_folder(settings.model)
    new = ModelFolder(settings.new_name)
    if new.path.exists():
        raise UserError(f"model '{new.name}' exists already")
    is_adapter = "@" in old.name
    if is_adapter and not new.name.startswith(f"{old.base}@"):
        raise UserError(f"an adapter keeps its base model: the new name must be '{old.base}@NAME'")
    if not is_adapter and "@" in new.name:
        raise UserError(f"'{old.name}' is not an adapter: only adapters have names like '{old.base}@NAME'")
    for adapter in adapters_of(old.name):  # they are renamed with their base
        adapter_name = adapter.removeprefix(f"{old.name}@")
        rename_folder(ModelFolder(adapter), ModelFolder(f"{new.name}@{adapter_name}"))
    rename_folder(old, new)


def rename_folder(old: ModelFolder, new: ModelFolder) -> None:
    with write_lock(old):
        # The card comes first, because only this write can fail on a full disk. If the process is killed in between,
        # the same command completes the renaming.
        old.write_card(replace(old.card, name=new.name))
        old.path.rename(new.path)


def confirm_removal(description: str) -> bool:
    """Ask the user whether to remove what is described. Raises UserError if standard input is not a terminal."""
    if not sys.stdin.isatty():
        raise UserError(f"removing {description} needs --yes, because standard input is not a terminal")
    print(f"permanently remove {description}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def remove_command(settings: RemoveSettings) -> None:
    folder = existing_folder(settings.model)
    if adapters := adapters_of(folder.name):
        raise UserError(f"model '{folder.name}' is the base of {', '.join(adapters)}: remove these adapters first")
    if not settings.yes and not confirm_removal(f"model '{folder.name}'"):
        return
    with write_lock(folder):
        # Without a card the folder is not a model, even if removing the rest is interrupted.
        (folder.path / "card.json").unlink()
        shutil.rmtree(folder.path)
