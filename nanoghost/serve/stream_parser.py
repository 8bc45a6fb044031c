"""From tokens to an answer: text as it comes, cut before a stop text, with calls of tools taken out of it.

What could still turn out to be the beginning of a stop text or of a call's mark is held back until it is known.
"""

import json
import secrets
from dataclasses import dataclass, field

from nanoghost.engine.logits_processors import TopLogprobs
from nanoghost.tokenizer.chat_format import parse_call
from nanoghost.tokenizer.tokenizer import StreamDecoder, Tokenizer

OPENING, CLOSING = "<tool_call>", "</tool_call>"


@dataclass
class Piece:
    """What is new of an answer."""

    text: str = ""
    tokens: list[tuple[int, TopLogprobs]] = field(default_factory=list)
    """The tokens of the text, where their probabilities are wanted."""
    calls: list[dict] = field(default_factory=list)
    """Whole calls of tools, in OpenAI's form."""


def end_of(text: str, marks: tuple[str, ...]) -> int:
    """Where the longest end of a text that may be the beginning of a mark begins; its length if there is none."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)


class Reply:
    """One message being written.

    With `calls` false nothing is a call. `forced`: the whole reply is the JSON of one call, whose mark the model was given.
    `keep_end`: the token that ends it counts among its tokens, though it has no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops=(), calls: bool = True, forced: bool = False, keep_end: bool = False
    ):
        self.tokenizer, self.stops, self.forced, self.keep_end = tokenizer, stops, forced, keep_end
        self.decoder = StreamDecoder(tokenizer)
        marked = calls and not tokenizer.chat_template  # ours are tokens, the marks of others may be text
        self.opening, self.closing = (tokenizer.special_id(mark) if marked else -1 for mark in (OPENING, CLOSING))
        self.mark = OPENING if calls and tokenizer.chat_template else ""
        self.marks = (*stops, self.mark) if self.mark else stops
        self.held = ""
        self.tokens: list[tuple[int, tuple[int, TopLogprobs]]] = []
        """(where in the text it begins, (id, probabilities)) of those that were not handed out."""
        self.shown = self.seen = 0
        """Characters handed out; characters decoded."""
        self.call: str | None = "" if forced else None
        self.stopped = False

    def feed(self, ids: list[int], likely: list[TopLogprobs]) -> Piece:
        """Take in what the model wrote; after a stop text nothing counts."""
        piece = Piece()
        for i, token in enumerate(ids):
            ended = token in self.tokenizer.stop_ids
            if self.stopped or (ended and not self.keep_end):
                break
            if likely:
                self.tokens.append((self.seen, (token, likely[i])))
            if ended:
                break
            if token == self.opening and self.call is None:
                self._text(self.decoder.flush(), piece)
                self._show(len(self.held), piece)
                self.call = ""
            elif token == self.closing and self.call is not None:
                self._end_call(piece)
            else:
                self._text(self.decoder.feed(token), piece)
        return piece

    def finish(self) -> Piece:
        """The message is over: what was held back is text, a call without its end is a call."""
        piece = Piece()
        if not self.stopped:
            self._text(self.decoder.flush(), piece)
            if self.call is not None:
                self._end_call(piece)
            self._cut(piece)
            self._show(len(self.held), piece)
            piece.tokens += [entry for _, entry in self.tokens]
            self.tokens = []
        return piece

    def _text(self, text: str, piece: Piece) -> None:
        self.seen += len(text)
        if self.call is None:
            self.held += text
        else:
            self.call += text
        while text and not self.stopped:
            if self.call is None:
                self._cut(piece)
                if self.stopped or not self.mark or self.mark not in self.held:
                    break
                before, _, self.call = self.held.partition(self.mark)
                self._show(len(before), piece)
                self.held = ""
                self.shown += len(self.mark)
            elif self.mark and CLOSING in self.call and not self.forced:
                self.call, _, rest = self.call.partition(CLOSING)
                self._end_call(piece, CLOSING)
                self.held += rest
            else:
                break
        if self.call is None and not self.stopped:
            self._show(end_of(self.held, self.marks), piece)

    def _cut(self, piece: Piece) -> None:
        """If a stop text came (before any call), the answer ends there."""
        mark = self.held.find(self.mark) if self.mark else -1
        found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        start = min(found)[1] if found else -1  # of the one that was complete first, however the text fell into tokens
        if found and (mark < 0 or start < mark):
            self._show(start, piece)
            self.stopped, self.held, self.tokens = True, "", []

    def _show(self, count: int, piece: Piece) -> None:
        piece.text += self.held[:count]
        self.held = self.held[count:]
        self.shown += count
        while self.tokens and self.tokens[0][0] < self.shown:
            piece.tokens.append(self.tokens.pop(0)[1])

    def _end_call(self, piece: Piece, closing: str = "") -> None:
        """What stood between the marks is calls, or text: the model's mistake, which the reader should see."""
        written, self.call = self.call or "", None
        calls = calls_of(written, several=bool(self.mark))
        if calls:
            piece.calls += calls
            self.shown += len(written + closing)
        else:
            self.shown -= len(self.mark) * (not self.forced)
            self.held += self.mark * (not self.forced) + written + closing
            self._show(len(self.held), piece)


def calls_of(text: str, several: bool) -> list[dict]:
    """OpenAI tool calls of the text between two marks: a JSON object or, with `several`, a list of them; none if it is neither."""
    text = text.strip()
    inner = [text]
    if several and text.startswith("["):
        try:
            inner = [json.dumps(element) for element in json.loads(text)]
        except (ValueError, RecursionError):
            return []
    calls = [parse_call(one) for one in inner]
    if not calls or not all(calls):
        return []
    return [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call} for call in calls]


# ── probabilities, in OpenAI's two forms ──────────────────────────────────────────────────────────────────────────────


def spelled(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace") or tokenizer.decode([token], skip_special=False)


def bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.token_bytes(token) or tokenizer.decode([token], skip_special=False).encode()


def chat_logprobs(tokenizer: Tokenizer, tokens: list[tuple[int, TopLogprobs]]) -> dict:
    def entry(token: int, logprob: float) -> dict:
        return {"token": spelled(tokenizer, token), "logprob": logprob, "bytes": list(bytes_of(tokenizer, token))}

    return {"content": [
        entry(token, logprob) | {"top_logprobs": [entry(*other) for other in others]} for token, (logprob, others) in tokens
    ], "refusal": None}  # fmt: skip


def key_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's name in a table by name: bytes that are no text of their own are spelled out, so that no two are alike."""
    try:
        return bytes_of(tokenizer, token).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token))


def completion_logprobs(
    tokenizer: Tokenizer, tokens: list[tuple[int, TopLogprobs | None]], top: int, offset: int = 0
) -> dict:
    """The first token of an echoed prompt has no probability: its entry is None."""
    found: dict = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, likely in tokens:
        found["tokens"].append(key_of(tokenizer, token))
        found["text_offset"].append(offset)
        offset += len(spelled(tokenizer, token))
        found["token_logprobs"].append(likely[0] if likely else None)
        table = {key_of(tokenizer, other): logprob for other, logprob in likely[1][:top]} if likely else None
        if likely and top:
            table.setdefault(found["tokens"][-1], likely[0])
        found["top_logprobs"].append(table)
    return found
