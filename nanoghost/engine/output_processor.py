"""After sampling: append tokens, check stop conditions, run tools, and turn tokens into messages."""

from nanoghost.engine.grammar import call_matcher
from nanoghost.engine.logits_processors import LogitsProcessor
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.sequence import Sequence
from nanoghost.tokenizer.chat_format import tool_response_ids
from nanoghost.tokenizer.reply_parser import TOOL_CALL_START, parse_reply
from nanoghost.tokenizer.tokenizer import Tokenizer

MAX_TOOL_ROUNDS = 4  # rounds of tool calls in one completion
TOOL_RESULT_TOKENS = 64  # tokens reserved for the results of each round


def max_sequence_len(prompt_ids: list[int], sampling: SamplingParams, has_tools: bool) -> int:
    """Maximum number of tokens that a sequence can need."""
    tool_tokens = TOOL_RESULT_TOKENS * MAX_TOOL_ROUNDS if has_tools else 0
    return len(prompt_ids) + sampling.max_tokens + tool_tokens


def accept_tokens(
    sequence: Sequence, draft_ids: list[int], sampled: list[tuple[int, float]], tokenizer: Tokenizer
) -> None:
    """Append the first sampled token (id, log-probability), and the next ones as long as the draft predicted them.

    Token i was sampled from the logits after i draft tokens, with the random number of its position. It is the token
    that decoding without a draft gives if and only if these i draft tokens are right.
    """
    for num_accepted, (token_id, logprob) in enumerate(sampled):
        sequence.append([token_id], [logprob], sampled=True)
        check_stop(sequence, tokenizer)
        constrain_call(sequence, token_id, tokenizer)
        predicted = num_accepted < len(draft_ids) and token_id == draft_ids[num_accepted]
        # The draft also ends here if a call begins, or if the result of a tool was appended after the token.
        if sequence.finish_reason or not predicted or sequence.logits_processor or sequence.pending_ids != [token_id]:
            break
        sequence.num_computed += 1  # the draft token's keys and values are in the cache
        sequence.pending_ids = []
    if draft_ids:
        sequence.prompt_lookup.update_draft_len(len(draft_ids), num_accepted)


def constrain_call(sequence: Sequence, token_id: int, tokenizer: Tokenizer) -> None:
    """From the token <tool_call> to </tool_call>, a model trained here can write nothing but one well-formed call."""
    processor = sequence.logits_processor
    if processor and processor.in_call and processor.matcher.is_stopped():
        processor.matcher, processor.in_call = None, False
        if processor.num_top_logprobs is None:
            sequence.logits_processor = None
    is_start = tokenizer.chat_template is None and token_id == tokenizer.special_tokens.get(TOOL_CALL_START)
    if is_start and sequence.sampling.constrain_calls and not (processor and processor.matcher):
        processor = sequence.logits_processor = processor or LogitsProcessor()
        processor.matcher, processor.in_call = call_matcher(tokenizer), True


def check_stop(sequence: Sequence, tokenizer: Tokenizer) -> None:
    """After a token: end the message (and run the tools it calls), or set `finish_reason`."""
    sampling = sequence.sampling
    num_sampled = sum(sequence.sampled_mask)
    if sequence.completion_ids[-1] in tokenizer.stop_ids and not sampling.ignore_eos:
        finish_message(sequence, tokenizer, can_continue=num_sampled < sampling.max_tokens)
    elif num_sampled >= sampling.max_tokens:
        sequence.finish_reason = "length"
    elif sampling.stop and has_stop_text(sequence, tokenizer):
        sequence.finish_reason = "stop"
    if sequence.num_computed + len(sequence.pending_ids) > sequence.max_len:
        sequence.finish_reason = sequence.finish_reason or "length"
    incomplete = sequence.message_start < len(sequence.completion_ids) or not sequence.messages
    if sequence.finish_reason and incomplete:
        finish_incomplete_message(sequence, tokenizer)


def has_stop_text(sequence: Sequence, tokenizer: Tokenizer) -> bool:
    text = tokenizer.decode(sequence.completion_ids[sequence.message_start :])
    return any(stop in text for stop in sequence.sampling.stop)


def reads_calls(sequence: Sequence, tokenizer: Tokenizer) -> bool:
    """Whether calls are read from a reply. A model with a template of its own writes tags as text: without tools they
    are nothing but text."""
    return sequence.run_tool is not None or tokenizer.chat_template is None


def parse_message(sequence: Sequence, tokenizer: Tokenizer) -> dict:
    """The message that the sequence has written last."""
    token_ids = sequence.completion_ids[sequence.message_start :]
    return parse_reply(token_ids, tokenizer, parse_calls=reads_calls(sequence, tokenizer))


def finish_message(sequence: Sequence, tokenizer: Tokenizer, can_continue: bool) -> None:
    """Called when the model ends its message.

    If the message calls tools, their results are appended to the sequence; otherwise the sequence is finished.
    """
    message = parse_message(sequence, tokenizer)
    sequence.messages.append(message)
    num_rounds = sum(m["role"] == "tool" for m in sequence.messages)
    if sequence.run_tool and can_continue and "tool_calls" in message and num_rounds < MAX_TOOL_ROUNDS:
        results = []
        for call in message["tool_calls"]:
            results.append({"role": "tool", "tool_call_id": call["id"], "content": sequence.run_tool(call)})
        sequence.messages += results
        num_free = sequence.max_len + 1 - sequence.num_computed - len(sequence.pending_ids)
        result_ids = tool_response_ids(results, tokenizer)[:num_free]
        sequence.append(result_ids, [0.0] * len(result_ids), sampled=False)
    else:
        sequence.finish_reason = "stop"
    sequence.message_start = len(sequence.completion_ids)


def finish_incomplete_message(sequence: Sequence, tokenizer: Tokenizer) -> None:
    """Called when the sequence ends within a message: keep what there is of it, up to the first stop text."""
    message = parse_message(sequence, tokenizer)
    content = message["content"]
    stop_positions = [content.find(text) for text in sequence.sampling.stop if text in content]
    sequence.messages.append(message | {"content": content[: min(stop_positions, default=None)]})
    sequence.message_start = len(sequence.completion_ids)
