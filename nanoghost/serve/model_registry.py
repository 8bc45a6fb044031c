"""The models and people that requests may name. A name from a request is looked up here and never becomes a path."""

import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_config, load_tokenizer
from nanoghost.home import ModelFolder, home, model_names, open_model
from nanoghost.memory.store import Person
from nanoghost.serve.engine_messages import Capacity, ModelRef
from nanoghost.serve.personal_routing import adapter_for_reply
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.tools.registry import learned_tool_calls

REFRESH_SECONDS = 1.0  # the list of models is read again after this time


@dataclass(frozen=True)
class ModelInfo:
    """A finished model that requests may name."""

    name: str
    base: str
    base_finished: float
    """When the base model was finished, in seconds since 1970."""
    created: int
    """When the model itself was finished, in seconds since 1970."""
    context: int
    """Maximum number of tokens of a conversation."""
    parameters: int
    supports_tools: bool
    """Whether the model was trained to call tools, here or by its authors."""
    learned_tools: bool
    """Whether it was trained to call tools here."""

    @property
    def adapter(self) -> Path | None:
        return ModelFolder(self.name).path if "@" in self.name else None

    @property
    def tokenizer(self) -> Tokenizer:
        return cached_tokenizer(self.base, self.base_finished)

    def ref(self, adapter: Path | None) -> ModelRef:
        """The base model with an adapter, if there is one."""
        if adapter is None:
            return ModelRef(self.base, self.base_finished)
        mtime_ns = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
        return ModelRef(self.base, self.base_finished, str(adapter), mtime_ns)

    def ref_for_person(self, person: str, messages: list[dict]) -> ModelRef:
        """The model for a person's last message: their adapter replies to messages about themselves."""
        return self.ref(adapter_for_reply(Person(person), ModelFolder(self.name), messages))


@lru_cache(maxsize=4)
def cached_tokenizer(base: str, base_finished: float) -> Tokenizer:
    """`base_finished` only belongs to the key of the cache: the tokenizer of a new base model is loaded again."""
    return load_tokenizer(ModelFolder(base).path)


@lru_cache(maxsize=256)
def template_supports_tools(base: str, base_finished: float) -> bool:
    """Whether the chat template can render tools. `base_finished` only belongs to the key of the cache."""
    template = load_tokenizer(ModelFolder(base).path).chat_template
    return template is None or template.supports_tools


class ModelRegistry:
    def __init__(self, default: str | None, capacity: Capacity):
        """`default`: the model to keep loaded; otherwise the one finished last, if there is any."""
        self.capacity = capacity
        self._models: dict[str, ModelInfo] = {}
        self._read_time = float("-inf")
        self._reported: set[str] = set()
        """Problems that standard error named already."""
        self.default = None
        if default or self.models():
            self.default = open_model(default).name

    def models(self) -> dict[str, ModelInfo]:
        """All finished models by name, the one finished last first."""
        if time.monotonic() - self._read_time >= REFRESH_SECONDS:
            models = {}
            for name in model_names():
                info = self._read_or_report(name)
                if info:
                    models[name] = info
            self._models = models  # only now: other threads read the list in the meantime
            self._read_time = time.monotonic()
        return self._models

    def _read_or_report(self, name: str) -> ModelInfo | None:
        """A model that cannot be read is reported once and does not affect the others."""
        try:
            return self._read(name)
        except (UserError, OSError) as error:
            self._report(f"the model {name} is not available: {error}")
            return None

    def _report(self, problem: str) -> None:
        if problem not in self._reported:
            print(problem, file=sys.stderr, flush=True)
        self._reported.add(problem)

    def _read(self, name: str) -> ModelInfo | None:
        folder = ModelFolder(name)
        base = ModelFolder(folder.base)
        if not folder.is_finished or not base.is_finished:
            return None
        card, base_card = folder.card, base.card
        trained_here = card.stage != "adopt"
        supports_tools = trained_here or template_supports_tools(base.name, base_card.finished)
        return ModelInfo(
            name=name,
            base=base.name,
            base_finished=base_card.finished,
            created=int(card.finished),
            context=min(load_config(base.path).context, self.capacity.context),
            parameters=base_card.parameters,
            learned_tools=learned_tool_calls(card),
            supports_tools=supports_tools and base_card.stage != "pretrain",  # tool calls are learned in later stages
        )

    def model(self, name: str) -> ModelInfo | None:
        return self.models().get(name)

    def default_ref(self) -> ModelRef | None:
        """The model that the engine loads when it starts."""
        info = self.model(self.default) if self.default else None
        return info.ref(None) if info else None

    def people(self) -> list[dict]:
        """The name of each person, and the base model that their adapter was trained for."""
        people = []
        for path in sorted((home() / "people").glob("*")):
            try:
                person = Person(path.name)
            except UserError:  # a file whose name cannot be that of a person
                continue
            try:
                inputs = person.adapter_inputs
            except UserError as error:  # it does not affect the others
                self._report(f"the memory of {person.name} is not available: {error}")
                inputs = None
            people.append({"name": person.name, "base": inputs.base if inputs else None})
        return people

    def person(self, name: str) -> Person | None:
        """A person who exists already: requests create nobody."""
        names = {person["name"] for person in self.people()}
        return Person(name) if name in names else None
