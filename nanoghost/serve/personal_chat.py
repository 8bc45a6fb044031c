"""A conversation with a person: messages go to their chat log, and replies use the adapter trained on their facts."""

from collections.abc import Iterator
from pathlib import Path

from nanoghost.engine.sampler import SamplingParams
from nanoghost.home import open_model
from nanoghost.memory.phrasings import FACTS_PROMPT, third_person_statement
from nanoghost.memory.store import Person, current_facts, search_facts
from nanoghost.serve.conversation import (
    MIN_REPLY_TOKENS,
    Conversation,
    ReplyFragment,
    system_messages,
    without_system,
)
from nanoghost.serve.personal_routing import adapter_for_reply, is_personal
from nanoghost.tokenizer.chat_format import text_of


class PersonalConversation(Conversation):
    """Messages that are not about the person are answered by the base model, as for anybody (memory/router.py)."""

    def __init__(
        self,
        person: str,
        lookup: bool,
        model: str | None,
        sampling: SamplingParams,
        system: str | None,
        documents: Path | None = None,
        tools: str | None = None,
    ):
        """`lookup`: also show the model the stored fact that fits the message best."""
        self.person = Person(person)
        self.lookup = lookup
        folder = open_model(model)
        super().__init__(folder.name, sampling, system, documents, tools, adapter=self.person.adapter_for(folder))
        self.adapter = self.engine.adapter
        """Name of the person's adapter in the engine, or of the model's own; empty if there is none."""
        self.person.create()
        self.line_history = self.person.line_history

    def ask(self, text: str) -> int:
        num_dropped = super().ask(text)
        self.person.log_message("user", text_of(self.messages[-1]))
        return num_dropped

    def prompt_messages(self) -> list[dict]:
        """The conversation, with the fact in its system message that fits the last message best, if there is one."""
        if not self.lookup or not is_personal(self.messages):
            return self.messages
        facts = current_facts(self.person.read_facts())
        matches = search_facts(facts, text_of(self.messages[-1]), 1)
        if not matches:
            return self.messages
        [fact] = matches
        system = [text_of(message) for message in system_messages(self.messages)]
        system.append(FACTS_PROMPT.format(facts=third_person_statement(fact.relation, fact.value)))
        extended = [{"role": "system", "content": "\n".join(system)}, *without_system(self.messages)]
        return self.truncate(extended, self.engine.runner.context - MIN_REPLY_TOKENS)

    def answer(self) -> Iterator[ReplyFragment]:
        num_messages = len(self.messages)
        uses_adapter = adapter_for_reply(self.person, self.folder, self.messages) is not None
        self.engine.adapter = self.adapter if uses_adapter else ""
        try:
            yield from super().answer()
        finally:
            new_messages = self.messages[num_messages:]
            reply = "".join(text_of(message) for message in new_messages if message["role"] == "assistant")
            if reply:
                self.person.log_message("assistant", reply)
