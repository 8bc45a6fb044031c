"""Import a GGUF file: check it, decode its weights to fp32, write a model folder."""

from pathlib import Path

import safetensors.torch
import torch

from nanoghost.errors import UserError
from nanoghost.formats.gguf_llama import read_config, read_weights, tensor_shapes
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.gguf_tokenizer import read_tokenizer
from nanoghost.formats.huggingface import check_tensor_shapes, write_config_files
from nanoghost.formats.licenses import copy_license_files
from nanoghost.formats.validation import STRING, check_fields, optional
from nanoghost.tokenizer.tokenizer import Tokenizer

PROVENANCE_FIELDS = ("general.name", "general.license", "general.organization")


def import_gguf(path: Path, target: Path) -> dict:
    """Write the files of a model folder to `target`; returns the model's entry in the card's `data`."""
    gguf = GGUFFile(path)
    config, tokenizer = read_config(gguf), read_tokenizer(gguf)
    check_fields(gguf.fields, dict.fromkeys(PROVENANCE_FIELDS, optional(STRING)), path)
    check_tensor_shapes(tensor_shapes(gguf), config, path)
    field = gguf.fields.get
    tokens, chat_template = field("tokenizer.ggml.tokens"), field("tokenizer.chat_template")
    bos, eos = field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")
    if not chat_template or eos is None:
        raise UserError(
            f"{path} has no chat template or no end-of-sequence token: adopt the model's Hugging Face folder instead"
        )
    special_tokens_map = {"eos_token": tokens[eos]}
    if bos is not None:
        special_tokens_map["bos_token"] = tokens[bos]
    stop_ids = {eos, field("tokenizer.ggml.eot_token_id", eos)}

    write_config_files(target, config, special_tokens_map, chat_template, sorted(stop_ids))
    Tokenizer(tokenizer).save(target)
    weights = {}
    for name, values in read_weights(gguf, config):
        # An fp32 tensor is a read-only view of the file, and torch wants memory that it may write.
        weights[name] = torch.from_numpy(values if values.flags.writeable else values.copy())
    safetensors.torch.save_file(weights, target / "model.safetensors", {"format": "pt"})
    copy_license_files(path.parent, target)
    copy_license_files(path.parent, target, strip_prefix=f"{path.stem}.")  # the names that `nanoghost export` writes
    stored_types = sorted({info.type.name for info in gguf.tensors.values()})
    return {
        "name": field("general.name", path.stem),
        "license": field("general.license", "unknown"),
        "attribution": f"{field('general.organization', 'unknown author')}; read from {path.name}",
        "changes": f"weights decoded from {', '.join(stored_types)} to fp32; tokenizer converted to tokenizer.json",
    }
