"""A conversation with somebody: it goes into their journal, and the model knows what their nights made of earlier ones."""

from collections.abc import Iterator
from pathlib import Path

from nanoghost.chat import text_of
from nanoghost.people import Person
from nanoghost.serve.terminal import Conversation, Said


class PersonalConversation(Conversation):
    def __init__(self, person: str, *arguments):
        self.person = Person(person)
        super().__init__(*arguments)
        self.person.create()

    def adapter(self) -> Path | None:
        return self.person.adapter_for(self.folder)

    def ask(self, text: str) -> int:
        dropped = super().ask(text)
        self.person.say("user", text_of(self.messages[-1]))
        return dropped

    def answer(self) -> Iterator[Said]:
        begun = len(self.messages)
        try:
            yield from super().answer()
        finally:
            if said := "".join(text_of(m) for m in self.messages[begun:] if m["role"] == "assistant"):
                self.person.say("assistant", said)
