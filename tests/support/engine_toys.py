"""Toy models for tests of the engine, and a runner that records what it runs."""

import torch

from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer


def perturbed(model, tokenizer: Tokenizer):
    """With random numbers added to all weights: a part whose weights start at zero would not be tested."""
    for p in model.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)
    model.set_character_features(tokenizer)
    return model


def toy_model(arch: str, tokenizer: Tokenizer):
    """A ghost or a Llama with a context of 512 tokens."""
    torch.manual_seed(0)
    V = tokenizer.vocab_size
    if arch == "ghost":
        model = Ghost(GhostConfig(vocab_size=V, context=512, depth=2, width=64, head_width=32, bigram_rows=64))
    else:
        model = Llama(LlamaConfig(V, 512, 2, 64, 4, 2, 96))
    return perturbed(model, tokenizer)


def toy_llama(tokenizer: Tokenizer, **changes) -> Llama:
    """A Llama that the kernels can run, with a context of 256 tokens."""
    torch.manual_seed(0)
    settings = {"depth": 2, "width": 64, "heads": 2, "key_value_heads": 1, "head_width": 64, "mlp_width": 96} | changes
    return perturbed(Llama(LlamaConfig(tokenizer.vocab_size, 256, **settings)), tokenizer)


class ScriptedModel(torch.nn.Module):
    """Generates the given tokens after a prompt, whatever it reads."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], script: list[int]):
        super().__init__()
        self.inner = toy_model("ghost", tokenizer)
        self.config, self.script, self.prompt_len = self.inner.config, script, len(prompt)
        self.dtype, self.device = self.inner.dtype, self.inner.device

    def new_cache(self, rows: int, capacity: int):
        return self.inner.new_cache(rows, capacity)

    def forward(self, tokens, cache, last_B):
        logits = torch.full((len(tokens), 1, self.config.vocab_size), -50.0)
        next_position = int(cache.next_index_B[0] + last_B[0]) + 1
        logits[0, 0, self.script[next_position - self.prompt_len]] = 50.0
        return logits


class RecordingRunner:
    """A model runner that records the batches and logits of each step."""

    def __init__(self, runner):
        self.runner = runner
        self.num_tokens: list[list[int]] = []
        """For each step the tokens of each chunk, without drafts."""
        self.logits: list[torch.Tensor] = []

    def run(self, batch):
        self.num_tokens.append([len(chunk.token_ids) - chunk.num_draft for chunk in batch])
        self.logits.append(self.runner.run(batch))
        return self.logits[-1]

    def __getattr__(self, name: str):
        return getattr(self.runner, name)
