"""Import a GGUF file: check it, decode its weights to fp32, write a model folder."""

from pathlib import Path

import safetensors.torch
import torch

from nanoghost.errors import UserError
from nanoghost.formats.gguf_llama import read_config, read_weights, tensor_shapes
from nanoghost.formats.gguf_split import gguf_stem, open_gguf
from nanoghost.formats.gguf_tokenizer import BOS_KEY, EOS_KEY, SPECIAL_TOKEN_KEYS, read_tokenizer
from nanoghost.formats.huggingface import check_tensor_shapes, write_config_files
from nanoghost.formats.licenses import copy_license_files
from nanoghost.formats.stop_tokens import ids_after_answer
from nanoghost.formats.validation import STRING, check_fields, optional
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tokenizer.tokenizer import Tokenizer

PROVENANCE_FIELDS = ("general.name", "general.license", "general.organization")


def import_gguf(path: Path, target: Path) -> dict:
    """Write the files of a model folder to `target`; returns the model's entry in the card's `data`."""
    gguf = open_gguf(path)
    values, tokenizer = read_config(gguf), Tokenizer(read_tokenizer(gguf))
    config = LlamaConfig.from_json(values)
    check_fields(gguf.fields, dict.fromkeys(PROVENANCE_FIELDS, optional(STRING)), path)
    check_tensor_shapes(tensor_shapes(gguf), config, path)
    field = gguf.fields.get
    tokens, chat_template = field("tokenizer.ggml.tokens"), field("tokenizer.chat_template")
    if not chat_template or EOS_KEY not in gguf.fields:
        raise UserError(
            f"{path} has no chat template or no end-of-sequence token: adopt the model's Hugging Face folder instead"
        )
    ids = {key: gguf.fields[key] for key in SPECIAL_TOKEN_KEYS if key in gguf.fields}
    special_tokens_map = {"eos_token": tokens[ids[EOS_KEY]]}
    if BOS_KEY in ids:
        special_tokens_map["bos_token"] = tokens[ids.pop(BOS_KEY)]
    tool_use_template = field("tokenizer.chat_template.tool_use", "")
    tokenizer.chat_template = ChatTemplate(chat_template, special_tokens_map, set(), tool_use_template)
    stop_ids = {*ids.values()} | ids_after_answer(tokenizer)

    write_config_files(target, values, config, special_tokens_map, tokenizer.chat_template.to_json(), stop_ids)
    tokenizer.save(target)
    weights = {}
    for name, values in read_weights(gguf, config):
        # An fp32 tensor is a read-only view of the file, and torch wants memory that it may write.
        weights[name] = torch.from_numpy(values if values.flags.writeable else values.copy())
    safetensors.torch.save_file(weights, target / "model.safetensors", {"format": "pt"})
    copy_license_files(path.parent, target)
    name = gguf_stem(path)
    copy_license_files(path.parent, target, strip_prefix=f"{name}.")  # the names that `nanoghost export` writes
    stored_types = sorted({info.type.name for info in gguf.tensors.values()})
    return {
        "name": field("general.name", name),
        "license": field("general.license", "unknown"),
        "attribution": f"{field('general.organization', 'unknown author')}; read from {gguf.path.name}",
        "changes": f"weights decoded from {', '.join(stored_types)} to fp32; tokenizer converted to tokenizer.json",
    }
