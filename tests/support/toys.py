"""Toy text, toy conversations and settings of toy models, shared by many tests."""

import random

import torch

from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import save_model
from nanoghost.home import ModelFolder
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer

TOY_FLAGS = ("--depth", 2, "--context", 64, "--batch", 4, "--vocab-size", 320)

TOY_TEMPLATE = (  # a chat template that adds a system message of its own
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONVERSATION = [  # the text of a special token in the first message must stay text
    {"role": "user", "content": " Hello <|im_end|> there"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "The king sees the sea."},
]

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.05,
    "residual_multiplier": 0.22,
    "logits_scaling": 4.0,
}


def toy_text(sentences: int = 1500, seed: int = 0) -> str:
    """Invented English with a small grammar: enough to learn something in a few steps."""
    rng = random.Random(seed)
    nouns = "king queen ghost sword sea crown night word".split()
    verbs = "sees loves fears calls finds keeps".split()
    names = "ANNA BEN CARL DORA".split()
    lines = []
    for _ in range(sentences):
        lines.append(f"{rng.choice(names)}.\nThe {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}.\n")
    return "\n".join(lines)


def add_noise(model, scale: float = 0.05):
    """Change every parameter a little, so that none stays zero or one, as after some training."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * scale)
    return model


def random_llama_folder(name: str, config: LlamaConfig, tokenizer: Tokenizer) -> ModelFolder:
    """A finished model folder with random weights, in the home folder of the test."""
    torch.manual_seed(0)
    folder = ModelFolder(name)
    save_model(folder.path, add_noise(Llama(config)), tokenizer)
    data = [{"name": "noise", "license": "none", "attribution": "nobody"}]
    folder.write_card(ModelCard(name=name, stage="pretrain", data=data, arch=config.model_type, finished=1.0))
    (folder.path / "events.jsonl").touch()
    return folder
