"""Log-probabilities of the tokens of a given text, computed in chunks between the steps of the engine."""

from collections.abc import Iterator

import torch

from nanoghost.engine.logits_processors import TopLogprobs, mask_unused_ids, top_logprobs
from nanoghost.engine.model_runner import ModelRunner
from nanoghost.tokenizer.tokenizer import Tokenizer

CHUNK_TOKENS = 256  # tokens whose logits exist at the same time: with a large vocabulary these take much memory


def prompt_logprobs(
    runner: ModelRunner, tokenizer: Tokenizer, token_ids: list[int], adapter: str, num_top_logprobs: int
) -> Iterator[list[TopLogprobs]]:
    """For token_ids[1:], a chunk at a time: the log-probability of each token, and of the likeliest in its place."""
    forward = runner.single_sequence(len(token_ids), adapter)
    num_inputs = len(token_ids) - 1  # nothing follows the last token
    for start in range(0, num_inputs, CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, num_inputs)
        with torch.no_grad():
            logits_TV = mask_unused_ids(forward(token_ids[start:end], start).float(), tokenizer)
            logprobs_TV = torch.log_softmax(logits_TV, 1)
        yield top_logprobs(logprobs_TV, token_ids[start + 1 : end + 1], num_top_logprobs)
