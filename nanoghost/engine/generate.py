"""Generation: conversations in, tokens out. Rows come and go at every step; a step is schedule, run, postprocess.

A row holds what it has not read yet: at first its prompt, then the token it wrote last, or what a tool answered. Each step
every row reads what is unread, long texts in chunks beside the others' single tokens, and a row that is up to date writes
one more token. What a runner is (plain.py: any model; paged.py: packed weights, pages shared by equal beginnings), a row
does not notice: its tokens depend on its prompt, its settings and its seed, not on who else is being served.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanoghost import hardware
from nanoghost.engine.sampler import Sampling, choose, uniform
from nanoghost.engine.torch_runner import PlainRunner
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_config, load_model, load_tokenizer
from nanoghost.home import ModelFolder
from nanoghost.tokenizer.chat_format import following, parse_reply

TOOL_ROUNDS = 4  # calls a model may make in one answer
TOOL_ROOM = 64  # tokens that an answer of a tool may take, on average


@dataclass(eq=False)
class Row:
    """One conversation being continued."""

    prompt: list[int]
    sampling: Sampling
    limit: int
    """Most tokens it may read."""
    stream: int = 0
    """Which of the seed's streams of random numbers is this row's."""
    run_tool: Callable[[dict], str] | None = None
    """Maps an OpenAI tool call to the tool's answer; without it a call just ends the answer."""
    adapter: str = ""
    """Which adapter speaks; empty for the base alone."""
    owner: str = ""
    """Whose it is: what was read is shared only among rows of one owner."""
    watcher: object | None = None
    """Sees the logits before each token is chosen (`before`, may change them in place), and which it was (`after`): watch.py."""
    ids: list[int] = field(default_factory=list)
    """What came after the prompt."""
    logprobs: list[float] = field(default_factory=list)
    """log P of each id under the distribution it was drawn from; 0 for what a tool wrote."""
    sampled: list[bool] = field(default_factory=list)
    """Whether the model chose the id (a tool's text was given)."""
    messages: list[dict] = field(default_factory=list)
    """Finished messages: assistant, tool, assistant ..."""
    message_start: int = 0
    """Where in `ids` the message being written begins."""
    read: int = 0
    """How many of its tokens are in the cache."""
    unread: list[int] = field(default_factory=list)
    """The tokens after them."""
    twins: list["Row"] = field(default_factory=list)
    """Other samples of the same prompt, which go on from here once it is read."""
    finish_reason: str = ""
    """stop, length, cancelled, or empty while running."""
    after: dict[tuple, int] = field(default_factory=dict)
    """Where in its tokens what followed a few tokens stands."""
    indexed: int = 0
    """How many of its tokens are noted there."""
    trust: int = 4
    """Tokens worth guessing."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.ids

    def add(self, ids: list[int], logprobs: list[float], sampled: bool) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.sampled += [sampled] * len(ids)
        self.unread += ids


@dataclass
class Reading:
    """What a row reads in one step."""

    row: Row
    tokens: list[int]
    wanted: int
    """After how many of these tokens, from the last one back, logits are wanted."""
    guessed: int = 0
    """How many of the tokens are only a guess."""


class Engine:
    def __init__(self, runner, tokenizer, adapter: str = ""):
        """`adapter`: the one that speaks where none is asked for; empty for the base alone."""
        self.runner, self.tokenizer, self.adapter = runner, tokenizer, adapter
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []

    def add(
        self, prompt: list[int], s: Sampling, samples=1, run_tool=None, adapter: str | None = None, stream=0
    ) -> list[Row]:
        """Queue a prompt to be continued `samples` times, with streams of random numbers from `stream` on.

        Raises UserError if the prompt leaves no room in the context.
        """
        context = self.runner.context
        if len(prompt) >= context:
            raise UserError(f"a prompt of {len(prompt)} tokens leaves no room in a context of {context}")
        limit = min(context, reach(prompt, s, run_tool))
        adapter = self.adapter if adapter is None else adapter
        rows = [Row(list(prompt), s, limit, stream + i, run_tool, adapter, unread=list(prompt)) for i in range(samples)]
        rows[0].twins = rows[1:]
        self.waiting.append(rows[0])
        return rows

    def cancel(self, row: Row) -> None:
        """Stop serving a row, whatever it is doing."""
        row.finish_reason = row.finish_reason or "cancelled"
        if row in self.running:
            self.running.remove(row)
            self.runner.close(row)
        elif row in self.waiting:
            self.waiting.remove(row)
        twins, row.twins = [twin for twin in row.twins if not twin.finish_reason], []
        for first in twins[:1]:  # the others' prompt is still to be read
            first.twins = twins[1:]
            self.waiting.appendleft(first)

    @torch.no_grad()
    def step(self) -> None:
        batch = self.schedule()
        logits = self.runner.run(batch)
        self.postprocess(batch, logits)

    def schedule(self) -> list[Reading]:
        """Let in whoever finds room; then everybody reads, as far as one step's work allows."""
        while self.waiting and self.runner.open(self.waiting[0]):
            row = self.waiting.popleft()
            row.unread = row.unread[row.read :]
            self.running.append(row)
        room, batch = self.runner.chunk, []
        # nobody's next word waits for a long text
        for row in sorted(self.running, key=lambda row: len(row.unread) > 1):
            count = 1 if len(row.unread) == 1 else min(len(row.unread), max(0, room))
            room -= count
            if count:
                up_to_date = count == len(row.unread)
                guess = (
                    self.runner.guess(row)
                    if up_to_date and self.runner.drafts and not (row.twins or row.watcher)
                    else []
                )
                batch.append(Reading(row, row.unread[:count] + guess, up_to_date + len(guess), len(guess)))
        return batch

    def postprocess(self, batch: list[Reading], logits) -> None:
        """What was read is read; those who are up to date write, and those who are done leave."""
        writers, places = [], []  # rows with their guesses, and which logits are theirs
        ready = 0
        for r in batch:
            own = len(r.tokens) - r.guessed
            r.row.read += own
            r.row.unread = r.row.unread[own:]
            if r.wanted:
                for row in [r.row, *self.seat_twins(r.row)]:
                    writers.append((row, r.tokens[own:]))
                    places += range(ready, ready + r.wanted)
                ready += r.wanted
        if not writers:
            return
        asked = [(row, len(row.ids) + i) for row, guess in writers for i in range(len(guess) + 1)]
        uniforms = [uniform(row.sampling.seed, row.stream, i) for row, i in asked]
        logits = logits if len(places) == ready else logits[places]
        for i, (row, _) in enumerate(asked):
            if row.watcher:
                row.watcher.before(logits[i])
        chosen = zip(*choose(logits, [row.sampling for row, _ in asked], uniforms))
        for row, guess in writers:
            own = [next(chosen) for _ in range(len(guess) + 1)]
            if row.watcher:
                row.watcher.after(own[0][0])
            accept(row, guess, own, self.settle)
            if row.finish_reason:
                self.runner.close(row)
        self.running = [row for row in self.running if not row.finish_reason]

    def seat_twins(self, row: Row) -> list[Row]:
        """The other samples go on from here, too; those who find no room now wait."""
        twins, row.twins = [twin for twin in row.twins if not twin.finish_reason], []
        seated = self.runner.fork(row, twins)
        for twin in twins[:seated]:
            twin.read, twin.unread = row.read, []
        self.running += twins[:seated]
        self.waiting.extendleft(reversed(twins[seated:]))
        return twins[:seated]

    def settle(self, row: Row) -> None:
        """After a token: has a message ended, a tool to run, a limit been reached?"""
        s, written = row.sampling, sum(row.sampled)
        if row.ids[-1] in self.tokenizer.ends and not s.endless:
            finish_message(row, self.tokenizer, written < s.max_tokens)
        elif written >= s.max_tokens:
            row.finish_reason = "length"
        elif s.stop and any(text in self.tokenizer.decode(row.ids[row.message_start :]) for text in s.stop):
            row.finish_reason = "stop"
        if row.read + len(row.unread) > row.limit:
            row.finish_reason = row.finish_reason or "length"
        unfinished = row.message_start < len(row.ids) or not row.messages
        if row.finish_reason and unfinished:
            close(row, self.tokenizer)


def accept(row: Row, guess: list[int], chosen: list[tuple[int, float]], settle) -> None:
    """Write what was chosen after each guessed token, as long as the guesses were right: the same text as without guessing."""
    for i, (token, logprob) in enumerate(chosen):
        row.add([token], [logprob], True)
        settle(row)
        right = i < len(guess) and token == guess[i] and row.unread == [token]
        if row.finish_reason or not right:
            break
        row.read, row.unread = row.read + 1, []
    if guess:
        row.trust = min(16, 2 * row.trust) if i == len(guess) else max(2, i + 1)


def reach(prompt: list[int], s: Sampling, run_tool) -> int:
    """How many tokens a row may come to."""
    return len(prompt) + s.max_tokens + (TOOL_ROOM * TOOL_ROUNDS if run_tool else 0)


def finish_message(row: Row, tokenizer, may_go_on: bool) -> None:
    """A message has ended: run the tool it calls and let the row read the answer, or finish it."""
    message = parse_reply(row.ids[row.message_start :], tokenizer)
    row.messages.append(message)
    rounds = sum(m["role"] == "tool" for m in row.messages)
    if row.run_tool and may_go_on and "tool_calls" in message and rounds < TOOL_ROUNDS:
        calls = message["tool_calls"]
        answers = [{"role": "tool", "tool_call_id": c["id"], "content": row.run_tool(c)} for c in calls]
        row.messages += answers
        given = following(answers, tokenizer)[: row.limit + 1 - row.read - len(row.unread)]
        row.add(given, [0.0] * len(given), False)
    else:
        row.finish_reason = "stop"
    row.message_start = len(row.ids)


def close(row: Row, tokenizer) -> None:
    """The row was cut off: keep what it wrote of its last message, up to a stop text."""
    message = parse_reply(row.ids[row.message_start :], tokenizer)
    stops = [message["content"].find(t) for t in row.sampling.stop if t in message["content"]]
    row.messages.append(message | {"content": message["content"][: min(stops, default=None)]})
    row.message_start = len(row.ids)


def open_engine(folder: ModelFolder, seats: int = 1, room: int | None = None, adapter: Path | None = None) -> Engine:
    """An engine for a finished model, with `seats` for conversations of `room` tokens (default: of a whole context).

    A Llama is packed where this machine has the kernels for it; everything else runs as PyTorch has it. Through the folder
    `adapter`, or that of BASE@NAME, go all rows that do not ask for another.
    """
    base = folder.path.with_name(folder.base)
    adapter = adapter or (folder.path if "@" in folder.name else None)
    config = load_config(base)
    room = min(room or config.context, config.context)
    runner = None
    if config.model_type != "nanoghost":
        from nanoghost.engine.paged_runner import open_paged

        runner = open_paged(base, config, seats, room)
    runner = runner or PlainRunner(load_model(base, hardware.compute_dtype(), hardware.device())[0], seats, room)
    if adapter:
        runner.add_adapter(adapter)
    return Engine(runner, load_tokenizer(base), str(adapter or ""))


def steps(
    model, tokenizer, prompts: list[list[int]], s: Sampling, samples: int = 1, run_tool=None, rank=0, world=1
) -> Iterator[list[Row]]:
    """Continue every prompt `samples` times; yields all rows after each step. Row p * samples + i belongs to prompt p.

    `model` may be a model or a runner. Raises UserError if a prompt leaves no room in the context. Where several processes
    share out prompts (`rank` the first and each `world`-th), each is continued as if one process had them all.
    """
    if isinstance(model, torch.nn.Module):
        model = runner_for(model, len(prompts) * samples, max(reach(p, s, run_tool) for p in prompts))
    engine = Engine(model, tokenizer)
    rows = [
        row
        for i, p in enumerate(prompts)
        for row in engine.add(p, s, samples, run_tool, stream=(rank + i * world) * samples)
    ]
    while not all(row.finish_reason for row in rows):
        engine.step()
        yield rows


def runner_for(model: torch.nn.Module, seats: int, capacity: int):
    """Where `seats` rows of `capacity` tokens find room. A Llama in bf16 is packed for it, as it is at this moment."""
    if model.config.model_type != "nanoghost" and model.dtype == torch.bfloat16:
        from nanoghost.engine.paged_runner import paged

        return paged(model, seats, capacity) or PlainRunner(model, seats, capacity)
    return PlainRunner(model, seats, capacity)


def generate(model, tokenizer, prompts, s: Sampling, samples: int = 1, run_tool=None, rank=0, world=1) -> list[Row]:
    """All rows, finished."""
    return deque(steps(model, tokenizer, prompts, s, samples, run_tool, rank, world), maxlen=1).pop()
