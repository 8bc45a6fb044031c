"""Logits processors: they see the logits of a sequence before each token is sampled, and the token afterwards.

Sequences with a grammar have one, to forbid tokens, and sequences whose client wants log-probabilities, to record them.

T tokens, V vocabulary.
"""

import torch

from nanoghost.tokenizer.tokenizer import Tokenizer

TopLogprobs = tuple[float, list[tuple[int, float]]]
"""For one token: its log-probability, and the likeliest tokens with theirs, before temperature and grammar."""


class LogitsProcessor:
    def __init__(self, matcher=None, num_top_logprobs: int | None = None):
        """`matcher`: the state of a grammar (llguidance.LLMatcher).
        `num_top_logprobs`: how many of the likeliest tokens to record for each token (None: record nothing).
        """
        self.matcher = matcher
        self.num_top_logprobs = num_top_logprobs
        self.in_call = False
        """The grammar is that of the tool call that the sequence is writing."""
        self.recorded_logprobs: list[TopLogprobs] = []
        self.logprobs_V: torch.Tensor | None = None
        """Log-probabilities of the next token; set by `process` for `accept`."""

    def process(self, logits_V: torch.Tensor) -> None:
        """Called before a token is sampled: tokens that the grammar forbids get -inf, in place."""
        if self.num_top_logprobs is not None:
            self.logprobs_V = torch.log_softmax(logits_V.float(), 0)
        if self.matcher:
            allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) > 0
            allowed = allowed.to(logits_V.device)
            logits_V[: len(allowed)].masked_fill_(~allowed, float("-inf"))
            logits_V[len(allowed) :] = float("-inf")  # the head may have more rows than the vocabulary has tokens

    def accept(self, token_id: int) -> None:
        """Called after a token is sampled."""
        if self.num_top_logprobs is not None:
            self.recorded_logprobs += top_logprobs(self.logprobs_V[None], [token_id], self.num_top_logprobs)
        if self.matcher:
            self.matcher.consume_token(token_id)


def mask_unused_ids(logits_NV: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """-inf, in place, for the rows of the head that belong to no token: some models fill up their vocabulary."""
    logits_NV[:, tokenizer.vocab_size :] = float("-inf")
    if tokenizer.unused_ids:
        logits_NV[:, tokenizer.unused_ids] = float("-inf")
    return logits_NV


def top_logprobs(logprobs_TV: torch.Tensor, token_ids: list[int], num_top_logprobs: int) -> list[TopLogprobs]:
    """For each token, its log-probability and the `num_top_logprobs` likeliest tokens in its place."""
    index_T1 = torch.tensor(token_ids, device=logprobs_TV.device)[:, None]
    logprobs = logprobs_TV.gather(1, index_T1)[:, 0].tolist()
    values, ids = logprobs_TV.topk(min(num_top_logprobs, logprobs_TV.size(1)))
    result = []
    for logprob, top_ids, top_values in zip(logprobs, ids.tolist(), values.tolist()):
        result.append((logprob, list(zip(top_ids, top_values))))
    return result
