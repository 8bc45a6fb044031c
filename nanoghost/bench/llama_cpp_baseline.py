"""The baseline `llama.cpp` of `bench decode` and `bench prefill`, through llama-cpp-python's low-level functions.

Only its forward passes are timed, not the sampling of tokens: that favors llama.cpp.
"""

import tempfile
import time
from pathlib import Path

from nanoghost import hardware
from nanoghost.commands import export
from nanoghost.home import ModelFolder

BATCH_TOKENS = 512  # tokens of a prompt in one call


class LlamaCpp:
    """A model in llama.cpp."""

    def __init__(self, folder: ModelFolder, slots: int, quant: str, slot_tokens: int):
        """A copy of the model in the format `quant`, with memory for `slots` sequences of `slot_tokens` tokens."""
        import llama_cpp

        self.library = llama_cpp
        self.log_callback = llama_cpp.llama_log_callback(ignore_log)  # an attribute: the library keeps a pointer to it
        llama_cpp.llama_log_set(self.log_callback, None)
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.gguf"
            export.main(export.ExportSettings(folder.name, quant=quant, out=path))
            model_settings = llama_cpp.llama_model_default_params()
            model_settings.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_settings)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = slots * slot_tokens
        settings.n_batch = max(BATCH_TOKENS, slots)
        settings.n_ubatch = BATCH_TOKENS
        settings.n_seq_max = slots
        settings.n_threads = settings.n_threads_batch = hardware.threads()
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(max(BATCH_TOKENS, slots), 0, 1)

    def forward(self, tokens: list[tuple[int, int, int]], all_logits: bool) -> None:
        """Compute tokens (token id, position, sequence) in one call, with logits after all of them or the last one."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token_id, position, sequence) in enumerate(tokens):
            batch.token[i] = token_id
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = all_logits or i == len(tokens) - 1
        error_code = self.library.llama_decode(self.context, batch)
        if error_code:
            raise RuntimeError(f"llama_decode failed with code {error_code}")

    def clear_cache(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Tokens per second of all sequences. The tokens of the prompts are repeated, because none are sampled."""
        self.clear_cache()
        for i, prompt in enumerate(prompts):
            self.forward([(token_id, position, i) for position, token_id in enumerate(prompt)], all_logits=False)
        start = time.perf_counter()
        for t in range(tokens - 1):
            step = [(prompt[t % len(prompt)], len(prompt) + t, i) for i, prompt in enumerate(prompts)]
            self.forward(step, all_logits=True)
        return len(prompts) * (tokens - 1) / (time.perf_counter() - start)

    def prefill(self, prompt: list[int]) -> float:
        """Tokens per second of a prompt."""
        self.clear_cache()
        start = time.perf_counter()
        for first in range(0, len(prompt), BATCH_TOKENS):
            chunk = prompt[first : first + BATCH_TOKENS]
            self.forward([(token_id, first + i, 0) for i, token_id in enumerate(chunk)], all_logits=False)
        return len(prompt) / (time.perf_counter() - start)


def ignore_log(level, text, data) -> None:
    pass
