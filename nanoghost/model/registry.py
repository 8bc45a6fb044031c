"""The architectures by the `model_type` of config.json: their classes here and in Hugging Face transformers.

To add one, write a model that satisfies `LanguageModel` (interface.py) and add it to ARCHITECTURES.
"""

from typing import NamedTuple

from torch import nn

from nanoghost.errors import UserError
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.model.interface import LanguageModel, ModelConfig
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig


class Architecture(NamedTuple):
    huggingface_class: str
    """Entry of `architectures` in config.json."""
    config_class: type[ModelConfig]
    model_class: type[nn.Module]
    pretrain_name: str | None = None
    """Its name for `pretrain --arch`; None: models of this type are only imported."""


ARCHITECTURES = {
    "nanoghost": Architecture("NanoghostForCausalLM", GhostConfig, Ghost, pretrain_name="ghost"),
    "llama": Architecture("LlamaForCausalLM", LlamaConfig, Llama, pretrain_name="llama"),
    "mistral": Architecture("MistralForCausalLM", LlamaConfig, Llama),
    "qwen2": Architecture("Qwen2ForCausalLM", LlamaConfig, Llama),
    "qwen3": Architecture("Qwen3ForCausalLM", LlamaConfig, Llama),
    "smollm3": Architecture("SmolLM3ForCausalLM", LlamaConfig, Llama),
    "granite": Architecture("GraniteForCausalLM", LlamaConfig, Llama),
}
CONFIG_CLASSES = {entry.pretrain_name: entry.config_class for entry in ARCHITECTURES.values() if entry.pretrain_name}
LLAMA_FAMILY = tuple(model_type for model_type, entry in ARCHITECTURES.items() if entry.model_class is Llama)


def architecture(model_type: str) -> Architecture:
    if model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise UserError(f"models of type '{model_type}' are not supported; nanoghost supports {supported}")
    return ARCHITECTURES[model_type]


def config_for_depth(arch: str, depth: int, vocab_size: int, context: int) -> ModelConfig:
    """The configuration of a new model: `--depth` sets its size."""
    check_arch(arch)
    return CONFIG_CLASSES[arch].for_depth(depth, vocab_size, context)


def check_arch(arch: str) -> None:
    if arch not in CONFIG_CLASSES:
        raise UserError(f"--arch: unknown '{arch}'; choose from {', '.join(CONFIG_CLASSES)}")


def config_from_json(values: dict) -> ModelConfig:
    """The configuration in the content of a config.json."""
    return architecture(values["model_type"]).config_class.from_json(values)


def config_to_json(config: ModelConfig) -> dict:
    """The content of config.json; the stop ids are the tokenizer's and not part of it."""
    return {"architectures": [ARCHITECTURES[config.model_type].huggingface_class], **config.to_json()}


def new_model(config: ModelConfig) -> LanguageModel:
    """A model with random weights."""
    return architecture(config.model_type).model_class(config)
