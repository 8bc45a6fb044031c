"""Which adapter replies to a person: theirs for messages about their own life, none for all other messages."""

from pathlib import Path

from nanoghost.home import ModelFolder
from nanoghost.memory.router import load_router
from nanoghost.memory.store import Person


def is_personal(messages: list[dict]) -> bool:
    """Whether the last user message is about the user's own life."""
    return load_router().is_personal(messages)


def adapter_for_reply(person: Person, model: ModelFolder, messages: list[dict]) -> Path | None:
    """Folder of the adapter for the reply to the last message; None for the base model alone.

    That is the person's adapter or, if they have none for this model, the model's own.
    """
    adapter = person.adapter_for(model)
    if adapter is None and "@" in model.name:
        adapter = model.path
    return adapter if adapter and is_personal(messages) else None
