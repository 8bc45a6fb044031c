"""The models that a server knows by name, and the people. A name that a client sends is looked up here, and never becomes a path."""

import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_config, load_tokenizer
from nanoghost.home import ModelFolder, home, model_names, open_model
from nanoghost.memory.store import Person
from nanoghost.serve.worker import Capacity, Voice
from nanoghost.tokenizer.tokenizer import Tokenizer

FRESH = 1.0  # seconds for which the list of models holds


@dataclass(frozen=True)
class Known:
    """A model that can be asked."""

    name: str
    base: str
    finished: float
    """Of the base."""
    created: int
    context: int
    """Most tokens of a conversation here."""
    parameters: int
    tools: bool
    """Whether somebody taught it to call tools: its makers, or a stage here."""

    @property
    def adapter(self) -> Path | None:
        return ModelFolder(self.name).path if "@" in self.name else None

    @property
    def tokenizer(self) -> Tokenizer:
        return _tokenizer(self.base, self.finished)

    def voice(self, adapter: Path | None = None) -> Voice:
        """The base, through an adapter if one is given."""
        return _voice(self.base, self.finished, adapter)

    def voice_for(self, person: str, messages: list[dict]) -> Voice:
        """Who answers that person."""
        from nanoghost.serve.personal_chat import voice  # brings all that nights need; most servers have no person

        return self.voice(voice(Person(person), ModelFolder(self.name), messages))


def _voice(base: str, finished: float, adapter: Path | None) -> Voice:
    if not adapter:
        return Voice(base, finished)
    return Voice(base, finished, str(adapter), (adapter / "adapter_model.safetensors").stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _tokenizer(base: str, finished: float) -> Tokenizer:
    return load_tokenizer(ModelFolder(base).path)


@lru_cache(maxsize=256)
def _knows_tools(base: str, finished: float) -> bool:
    dialect = load_tokenizer(ModelFolder(base).path).chat_template
    return not dialect or dialect.supports_tools


class Registry:
    def __init__(self, default: str | None, capacity: Capacity):
        """`default`: the model that is kept ready; else the one finished last, if there is any."""
        self.capacity, self._damaged = capacity, set()
        self.default = open_model(default).name if default or self.models() else None

    def models(self) -> dict[str, Known]:
        """All finished models by name, the one finished last first."""
        if time.monotonic() - getattr(self, "_read", -FRESH) >= FRESH:
            self._models, self._read = (
                {name: known for name in model_names() if (known := self._whole(name))},
                time.monotonic(),
            )
        return self._models

    def _whole(self, name: str) -> Known | None:
        """A folder that cannot be read is no model to ask, and hinders no other."""
        try:
            return self._known(name)
        except (UserError, OSError) as e:
            if name not in self._damaged:
                print(f"{name} is not served: {e}", file=sys.stderr, flush=True)
            self._damaged.add(name)
            return None

    def _known(self, name: str) -> Known | None:
        folder = ModelFolder(name)
        base = ModelFolder(folder.base)
        if not folder.finished or not base.finished:
            return None
        card, own = folder.card, base.card
        context = min(load_config(base.path).context, self.capacity.context)
        tools = own.stage != "pretrain" and (card.stage != "adopt" or _knows_tools(base.name, own.finished))
        return Known(name, base.name, own.finished, int(card.finished), context, own.parameters, tools)

    def model(self, name: str) -> Known | None:
        return self.models().get(name)

    def ready_voice(self) -> Voice | None:
        """What the engine loads when it starts."""
        known = self.model(self.default) if self.default else None
        return known.voice() if known else None

    def people(self) -> list[dict]:
        """Names, and which base each one's adapter was made for."""
        found = []
        for path in sorted((home() / "people").glob("*")):
            try:
                person = Person(path.name)
            except UserError:  # something else that lies there
                continue
            inputs = person.adapter_inputs
            found.append({"name": person.name, "base": inputs.base if inputs else None})
        return found

    def person(self, name: str) -> Person | None:
        """Somebody who is there already: nobody is made by a request."""
        return Person(name) if name in {found["name"] for found in self.people()} else None
