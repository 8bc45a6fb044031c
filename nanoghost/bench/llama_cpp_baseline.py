"""llama.cpp as a contender of `nanoghost bench`, through llama-cpp-python's low-level functions.

Only its decode calls are timed, without sampling, which is to its favour.
"""

import tempfile
import time
from pathlib import Path

import llama_cpp

from nanoghost import hardware
from nanoghost.commands import export
from nanoghost.home import ModelFolder


class LlamaCpp:
    def __init__(self, folder: ModelFolder, seats: int, quant: str, room: int):
        """`room`: tokens that each of `seats` conversations may come to."""
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.gguf"
            export.main(export.ExportSettings(folder.name, quant=quant, out=path))
            llama_cpp.llama_log_set(_silent, None)
            settings = llama_cpp.llama_model_default_params()
            settings.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        c = llama_cpp.llama_context_default_params()
        c.n_ctx, c.n_batch, c.n_ubatch, c.n_seq_max = seats * room, max(512, seats), 512, seats
        c.n_threads = c.n_threads_batch = hardware.threads()
        self.context = llama_cpp.llama_init_from_model(self.model, c)
        self.batch = llama_cpp.llama_batch_init(max(512, seats), 0, 1)

    def decode(self, tokens: list[tuple[int, int, int]], all_logits: bool) -> None:
        """Read (token, position, sequence) in one call."""
        b = self.batch
        b.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0] = token, position, 1, sequence
            b.logits[i] = all_logits or i == len(tokens) - 1
        assert llama_cpp.llama_decode(self.context, b) == 0

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def write(self, prompts: list[list[int]], tokens: int) -> float:
        self.forget()
        for i, prompt in enumerate(prompts):
            self.decode([(token, at, i) for at, token in enumerate(prompt)], False)
        start = time.perf_counter()
        for t in range(tokens - 1):
            self.decode([(p[t % len(p)], len(p) + t, i) for i, p in enumerate(prompts)], True)
        return len(prompts) * (tokens - 1) / (time.perf_counter() - start)

    def read(self, prompt: list[int]) -> float:
        self.forget()
        start = time.perf_counter()
        for at in range(0, len(prompt), 512):
            self.decode([(token, at + i, 0) for i, token in enumerate(prompt[at : at + 512])], False)
        return len(prompt) / (time.perf_counter() - start)


_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
