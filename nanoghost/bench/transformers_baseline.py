"""The baseline `transformers` of `bench decode` and `bench prefill`: bf16, eager mode, `generate`."""

import time

import torch

from nanoghost.home import ModelFolder


class TransformersEngine:
    """A model in transformers."""

    def __init__(self, folder: ModelFolder):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.bfloat16)

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Tokens per second of all sequences, prefill included. Prompts are cut to one length, so none is padded."""
        shortest = min(map(len, prompts))
        ids = torch.tensor([prompt[:shortest] for prompt in prompts])
        settings = {"max_new_tokens": tokens, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
        start = time.perf_counter()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return len(prompts) * tokens / (time.perf_counter() - start)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        """Tokens per second of a prompt."""
        start = time.perf_counter()
        self.model(torch.tensor([prompt]), logits_to_keep=1)
        return len(prompt) / (time.perf_counter() - start)
