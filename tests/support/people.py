"""Helpers for tests of personal memory: facts, changes through `nanoghost memory`, and nights at toy size."""

from nanoghost.home import ModelFolder
from nanoghost.memory import memory_command, night
from nanoghost.memory.night_record import NightRecord
from nanoghost.memory.recipe import AdapterRecipe
from nanoghost.memory.store import Fact, Person

TOY_RECIPE = AdapterRecipe(rank=2, answer_tokens=4)


class QuietDisplay:
    """A display that shows nothing."""

    def print(self, text: str) -> None:
        pass

    def show(self, event: dict) -> None:
        pass


def make_fact(fact_id: int, relation: str, value: str, sources=(), supersedes: int | None = None) -> Fact:
    return Fact(fact_id, relation, value, time=fact_id, sources=tuple(sources), supersedes=supersedes)


def memory(person: Person, **settings) -> None:
    """`nanoghost memory --person NAME` with these settings."""
    memory_command.command(memory_command.MemorySettings(person.name, **settings))


def toy_night(person: Person, base: ModelFolder, stop_flag, **arguments) -> NightRecord | None:
    return night.run_night(person, base, QuietDisplay(), stop_flag, TOY_RECIPE, **arguments)


def adapter_bytes(folder) -> bytes:
    """The weights of the adapter in that folder."""
    return (folder / "adapter_model.safetensors").read_bytes()
