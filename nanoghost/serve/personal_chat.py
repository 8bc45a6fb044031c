"""A conversation with somebody: it goes into their journal, and the model knows what their nights made of earlier ones."""

from collections.abc import Iterator
from pathlib import Path

from nanoghost.home import ModelFolder
from nanoghost.memory.phrasings import FACTS_PROMPT, third_person_statement
from nanoghost.memory.router import load_router
from nanoghost.memory.store import Person, current_facts, search_facts
from nanoghost.serve.terminal import LEAST, Conversation, Said
from nanoghost.tokenizer.chat_format import truncate_oldest_turns, text_of


def voice(person: Person, folder: ModelFolder, messages: list[dict]) -> Path | None:
    """The adapter that answers: theirs (or the model's own) where the last message is about them, otherwise none."""
    own = person.adapter_for(folder) or (folder.path if "@" in folder.name else None)
    return own if own and load_router().is_personal(messages) else None


class PersonalConversation(Conversation):
    """What is not about this person is answered by the base model alone, as it would answer anybody (sleep/router.py)."""

    def __init__(self, person: str, lookup: bool, *arguments):
        self.person, self.lookup = Person(person), lookup
        super().__init__(*arguments)
        self.own = self.engine.adapter
        self.person.create()

    def adapter(self) -> Path | None:
        return self.person.adapter_for(self.folder)

    def ask(self, text: str) -> int:
        dropped = super().ask(text)
        self.person.log_message("user", text_of(self.messages[-1]))
        return dropped

    def with_notes(self) -> list[dict]:
        """The conversation and, with `lookup`, the row of the ledger that has most to do with the last message."""
        facts = current_facts(self.person.read_facts()) if self.lookup and load_router().is_personal(self.messages) else []
        matches = search_facts(facts, text_of(self.messages[-1]), 1)
        found = [third_person_statement(fact.relation, fact.value) for fact in matches]
        if not found:
            return self.messages
        system = [text_of(m) for m in self.messages if m["role"] == "system"] + [FACTS_PROMPT.format(facts=found[0])]
        rest = [m for m in self.messages if m["role"] != "system"]
        room = self.engine.runner.context - LEAST
        return truncate_oldest_turns(
            [{"role": "system", "content": "\n".join(system)}, *rest], self.tokenizer, room, generation=True
        )

    def answer(self, read: list[dict] | None = None) -> Iterator[Said]:
        begun = len(self.messages)
        self.engine.adapter = self.own if voice(self.person, self.folder, self.messages) else ""
        try:
            yield from super().answer(read or self.with_notes())
        finally:
            if said := "".join(text_of(m) for m in self.messages[begun:] if m["role"] == "assistant"):
                self.person.log_message("assistant", said)
