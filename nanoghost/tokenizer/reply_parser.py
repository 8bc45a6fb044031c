"""Parser of what a model writes: token ids in; text and tool calls out, as soon as they are certain.

There are two syntaxes of a tool call. Models trained here write the special tokens <tool_call> and </tool_call> around
one JSON object. Models with a chat template of their own write the same tags as special tokens, if they have them, or
as ordinary text, which may be spread over several tokens, around one JSON object or a list of them.

Text that may turn out to be the start of a stop text or of a tag is held back until the next tokens decide.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from nanoghost.tokenizer.tokenizer import StreamDecoder, Tokenizer

TOOL_CALL_START = "<tool_call>"
TOOL_CALL_END = "</tool_call>"


@dataclass
class ReplyDelta:
    """What the latest tokens add to a reply."""

    text: str = ""
    tool_calls: list[dict] = field(default_factory=list)
    """Complete tool calls in OpenAI's form, with the ids call_1, call_2 ... within the reply."""
    malformed_calls: list[str] = field(default_factory=list)
    """What was between the special tokens of calls that cannot be read, if it does not stay in the text."""
    tokens: list[tuple[int, Any]] = field(default_factory=list)
    """The tokens of the text, each with what `feed` got about it (such as its log-probability)."""


class ReplyParser:
    """Parses one message while it is being generated."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_texts: tuple[str, ...] = (),
        parse_calls: bool = True,
        forced_call: bool = False,
        keep_stop_token: bool = False,
        keep_malformed: bool = True,
    ):
        """`stop_texts` end the reply and are cut off; `parse_calls`: False leaves tool calls in the text.

        `forced_call`: the whole reply is one call, whose opening tag was part of the prompt.
        `keep_stop_token`: the stop token is reported among the tokens, though it has no text.
        `keep_malformed`: a call between special tokens that cannot be read stays in the text.
        """
        self.tokenizer = tokenizer
        self.stop_texts = tuple(stop_texts)
        self.forced_call = forced_call
        self.keep_stop_token = keep_stop_token
        self.keep_malformed = keep_malformed
        self.decoder = StreamDecoder(tokenizer)
        self.tags_are_text = parse_calls and tokenizer.chat_template is not None
        self.start_id = self.end_id = None
        """Special tokens around a call, if the tokenizer has them."""
        if parse_calls:
            self.start_id = tokenizer.special_tokens.get(TOOL_CALL_START)
            self.end_id = tokenizer.special_tokens.get(TOOL_CALL_END)
        self.patterns = self.stop_texts
        """Texts whose beginning is held back."""
        if self.tags_are_text:
            self.patterns += (TOOL_CALL_START,)
        self.held_text = ""
        """Decoded text outside of calls that is not emitted yet."""
        self.call_text: str | None = "" if forced_call else None
        """Text of the call being written; None outside of a call."""
        self.call_start = ""
        """The opening tag of that call, if it was text."""
        self.num_calls = 0
        self.num_decoded = 0
        """Characters decoded so far."""
        self.num_emitted = 0
        """Characters emitted so far, as text or as part of a call."""
        self.held_tokens: list[tuple[int, tuple[int, Any]]] = []
        """(position of its first character, (token id, info)) of tokens that are not emitted yet."""
        self.stopped = False
        """A stop text was found: the reply is complete."""

    def feed(self, token_ids: list[int], token_info: list | None = None) -> ReplyDelta:
        """Process the next tokens. Tokens are reported in the deltas only if `token_info` has an entry for each."""
        delta = ReplyDelta()
        for i, token_id in enumerate(token_ids):
            if self.stopped:
                break
            is_stop_token = token_id in self.tokenizer.stop_ids
            if token_info and (self.keep_stop_token or not is_stop_token):
                self.held_tokens.append((self.num_decoded, (token_id, token_info[i])))
            if is_stop_token:
                continue
            if token_id == self.start_id and self.call_text is None:
                self._add_text(self.decoder.flush(), delta)
                self._emit(len(self.held_text), delta)
                self.call_text = ""
            elif token_id == self.end_id and self.call_text is not None:
                self._end_call(delta)
            else:
                self._add_text(self.decoder.feed(token_id), delta)
        return delta

    def finish(self) -> ReplyDelta:
        """The reply is complete: text that was held back is emitted, and a call without an end tag ends here."""
        delta = ReplyDelta()
        if self.stopped:
            return delta
        self._add_text(self.decoder.flush(), delta)
        if self.call_text is not None:
            self._end_call(delta)
        self._cut_at_stop_text(delta)
        self._emit(len(self.held_text), delta)
        delta.tokens += [token for _, token in self.held_tokens]
        self.held_tokens = []
        return delta

    def _add_text(self, text: str, delta: ReplyDelta) -> None:
        if not text:
            return
        self.num_decoded += len(text)
        if self.call_text is None:
            self.held_text += text
        else:
            self.call_text += text
        found_tag = True
        while found_tag and not self.stopped:
            found_tag = self._parse_next(delta)
        if self.call_text is None and not self.stopped:
            self._emit(partial_match_start(self.held_text, self.patterns), delta)

    def _parse_next(self, delta: ReplyDelta) -> bool:
        """Handle the next stop text or textual tag; returns whether a tag was found, so that more may follow it."""
        if self.call_text is None:
            self._cut_at_stop_text(delta)
            if not self.tags_are_text or TOOL_CALL_START not in self.held_text:
                return False
            self._emit(self.held_text.index(TOOL_CALL_START), delta)
            self.call_text = self.held_text.removeprefix(TOOL_CALL_START)
            self.held_text = ""
            self.call_start = TOOL_CALL_START
            self.num_emitted += len(TOOL_CALL_START)
            return True
        if not self.tags_are_text or self.forced_call or TOOL_CALL_END not in self.call_text:
            return False
        self.call_text, _, rest = self.call_text.partition(TOOL_CALL_END)
        self._end_call(delta, TOOL_CALL_END)
        self.held_text += rest
        return True

    def _cut_at_stop_text(self, delta: ReplyDelta) -> None:
        """If there is a stop text before the next call, the reply ends in front of it."""
        matches = []
        for stop_text in self.stop_texts:
            start = self.held_text.find(stop_text)
            if start >= 0:
                matches.append((start + len(stop_text), start))
        if not matches:
            return
        _, start = min(matches)  # the one that was complete first, however the text is split into tokens
        call_start = self.held_text.find(TOOL_CALL_START) if self.tags_are_text else -1
        if 0 <= call_start <= start:
            return
        self._emit(start, delta)
        self.stopped = True
        self.held_text = ""
        self.held_tokens = []

    def _emit(self, num_characters: int, delta: ReplyDelta) -> None:
        """Move the first characters of `held_text`, and the tokens that begin in them, to the delta."""
        delta.text += self.held_text[:num_characters]
        self.held_text = self.held_text[num_characters:]
        self.num_emitted += num_characters
        while self.held_tokens and self.held_tokens[0][0] < self.num_emitted:
            delta.tokens.append(self.held_tokens.pop(0)[1])

    def _end_call(self, delta: ReplyDelta, end_tag: str = "") -> None:
        call_text, start_tag = self.call_text or "", self.call_start
        self.call_text, self.call_start = None, ""
        functions = parse_functions(call_text, allow_list=self.tags_are_text)
        for function in functions:
            self.num_calls += 1
            delta.tool_calls.append({"id": f"call_{self.num_calls}", "type": "function", "function": function})
        is_text = not functions and (self.keep_malformed or bool(start_tag))
        if is_text:  # the model's mistake
            self.num_emitted -= len(start_tag)
            self.held_text += start_tag + call_text + end_tag
            self._emit(len(self.held_text), delta)
            return
        self.num_emitted += len(call_text + end_tag)
        if not functions:
            delta.malformed_calls.append(call_text)


def parse_reply(token_ids: list[int], tokenizer: Tokenizer, parse_calls: bool = True) -> dict:
    """The assistant message of a complete list of generated tokens; `parse_calls` as for ReplyParser."""
    parser = ReplyParser(tokenizer, parse_calls=parse_calls)
    delta = parser.feed(token_ids)
    rest = parser.finish()
    message = {"role": "assistant", "content": delta.text + rest.text}
    tool_calls = delta.tool_calls + rest.tool_calls
    return message | ({"tool_calls": tool_calls} if tool_calls else {})


def parse_functions(text: str, allow_list: bool) -> list[dict]:
    """The functions that the text between two tags calls: a JSON object or, with `allow_list`, a list of them.

    Empty if the text is not valid.
    """
    text = text.strip()
    try:
        value = json.loads(text)
        entries = value if allow_list and isinstance(value, list) else [value]
        functions = [called_function(entry) for entry in entries]
    except (ValueError, RecursionError):  # not JSON; a number of 5000 digits; a thousand opening brackets
        return []
    return functions


def called_function(value) -> dict:
    """{"name", "arguments" (JSON text)} of a parsed call, as in OpenAI's tool calls. Raises ValueError if invalid."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or "arguments" not in value:
        raise ValueError("a call is an object with a name and arguments")
    return {"name": value["name"], "arguments": json.dumps(value["arguments"])}


def partial_match_start(text: str, patterns: tuple[str, ...]) -> int:
    """Index of the longest suffix of the text that is the beginning of a pattern; len(text) if there is none."""
    longest = max((len(pattern) for pattern in patterns), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(pattern.startswith(text[start:]) for pattern in patterns):
            return start
    return len(text)
