"""Which classes implement a `model_type` of config.json."""

from nanoghost.errors import UserError
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.model.llama import Llama, LlamaConfig

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def architecture(model_type: str):
    """(configuration class, model class)."""
    if model_type == "nanoghost":
        return GhostConfig, Ghost
    if model_type in FAMILY:
        return LlamaConfig, Llama
    known = ", ".join(("nanoghost", *FAMILY))
    raise UserError(f"a model of kind '{model_type}' cannot run here; nanoghost knows {known}")
