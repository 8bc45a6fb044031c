"""Log-probabilities of tokens in OpenAI's two forms: that of chat completions and that of plain completions."""

from nanoghost.engine.logits_processors import TopLogprobs
from nanoghost.tokenizer.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a token; the name of a special token."""
    text = tokenizer.token_bytes(token_id).decode(errors="replace")
    return text or tokenizer.decode([token_id], skip_special=False)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of a token; the name of a special token."""
    return tokenizer.token_bytes(token_id) or tokenizer.decode([token_id], skip_special=False).encode()


def token_key(tokenizer: Tokenizer, token_id: int) -> str:
    """A unique name of a token: its text, or `bytes:` and its bytes in hexadecimal if they are not UTF-8."""
    try:
        return token_bytes(tokenizer, token_id).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token_id))


def chat_logprobs(tokenizer: Tokenizer, tokens: list[tuple[int, TopLogprobs]]) -> dict:
    """`tokens`: each token id with its log-probability and the likeliest tokens."""
    content = []
    for token_id, (logprob, top) in tokens:
        entry = logprob_entry(tokenizer, token_id, logprob)
        entry["top_logprobs"] = [logprob_entry(tokenizer, *candidate) for candidate in top]
        content.append(entry)
    return {"content": content, "refusal": None}


def logprob_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict:
    return {
        "token": token_text(tokenizer, token_id),
        "logprob": logprob,
        "bytes": list(token_bytes(tokenizer, token_id)),
    }


def completion_logprobs(
    tokenizer: Tokenizer, tokens: list[tuple[int, TopLogprobs | None]], num_top: int, text_offset: int = 0
) -> dict:
    """Columns with one entry for each token. `text_offset`: position of the first token in the text of the choice.

    The first token of an echoed prompt has no log-probability: its entries are None.
    """
    columns: dict = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, logprobs in tokens:
        key = token_key(tokenizer, token_id)
        columns["tokens"].append(key)
        columns["text_offset"].append(text_offset)
        text_offset += len(token_text(tokenizer, token_id))
        if logprobs is None:
            columns["token_logprobs"].append(None)
            columns["top_logprobs"].append(None)
            continue
        logprob, top = logprobs
        candidates = {token_key(tokenizer, candidate): value for candidate, value in top[:num_top]}
        if num_top:
            candidates.setdefault(key, logprob)  # OpenAI adds the token itself if it is not among the likeliest
        columns["token_logprobs"].append(logprob)
        columns["top_logprobs"].append(candidates)
    return columns
