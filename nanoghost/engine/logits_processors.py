"""Logits processors: what some sequences need at each token.

A grammar allows only some of the tokens; log-probabilities are recorded for the client. T tokens, V vocabulary.
"""

import torch

TopLogprobs = tuple[float, list[tuple[int, float]]]
"""For one token: its log-probability, and the likeliest tokens with theirs, before temperature and grammar."""


class LogitsProcessor:
    def __init__(self, matcher=None, top: int | None = None):
        """`matcher`: the state of a grammar (llguidance.LLMatcher); `top`: how many of the likeliest tokens to record
        for each token (None: record nothing)."""
        self.matcher = matcher
        self.top = top
        self.recorded: list[TopLogprobs] = []
        self.logprobs_V: torch.Tensor | None = None
        """Log-probabilities of the next token; set by `process` for `accept`."""

    def process(self, logits_V: torch.Tensor) -> None:
        """Before a token is sampled: tokens that the grammar forbids get -inf, in place."""
        if self.top is not None:
            self.logprobs_V = torch.log_softmax(logits_V.float(), 0)
        if self.matcher:
            allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) > 0
            allowed = allowed.to(logits_V.device)
            logits_V[: len(allowed)].masked_fill_(~allowed, float("-inf"))
            logits_V[len(allowed) :] = float("-inf")  # the head may have more rows than the vocabulary has tokens

    def accept(self, token_id: int) -> None:
        """After a token is sampled."""
        if self.top is not None:
            self.recorded += top_logprobs(self.logprobs_V[None], [token_id], self.top)
        if self.matcher:
            self.matcher.consume_token(token_id)


def top_logprobs(logprobs_TV: torch.Tensor, token_ids: list[int], top: int) -> list[TopLogprobs]:
    """For each token, its log-probability and the `top` likeliest tokens in its place."""
    index_T1 = torch.tensor(token_ids, device=logprobs_TV.device)[:, None]
    logprobs = logprobs_TV.gather(1, index_T1)[:, 0].tolist()
    values, ids = logprobs_TV.topk(min(top, logprobs_TV.size(1)))
    result = []
    for logprob, top_ids, top_values in zip(logprobs, ids.tolist(), values.tolist()):
        result.append((logprob, list(zip(top_ids, top_values))))
    return result
