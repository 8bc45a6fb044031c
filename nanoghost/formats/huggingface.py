"""Import a Hugging Face model folder of unknown origin: read its files, check them, write a normalized model folder.

Everything in such a folder is untrusted: values are checked before they are used, and shapes before tensors are read.
`check_tensor_shapes`, `check_tokenizer` and `write_config_files` also serve the import of GGUF files.
"""

import json
import re
from pathlib import Path

import safetensors.torch
import torch

from nanoghost.errors import UserError
from nanoghost.formats.licenses import copy_license_files
from nanoghost.formats.safetensors_file import read_header, read_tensors
from nanoghost.formats.validation import OBJECT, TOKEN_IDS, Check, check_fields, check_llama_config, one_of, optional
from nanoghost.home import write_json
from nanoghost.model.registry import LLAMA_FAMILY, architecture, config_from_json, new_model
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer


def _is_token(value) -> bool:
    """A special token is given as its text, or as an object with the text and properties that nanoghost ignores."""
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_chat_template(value) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(_is_named_template, value)))


def _is_named_template(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("template"), str)


TOKEN_CHECK = Check("a string or an object with the string 'content'", _is_token)
CHAT_TEMPLATE_CHECK = Check("a string or a list of objects with the strings 'name' and 'template'", _is_chat_template)
TOKENIZER_CONFIG_CHECKS = {
    "bos_token": optional(TOKEN_CHECK),
    "eos_token": TOKEN_CHECK,
    "chat_template": optional(CHAT_TEMPLATE_CHECK),
}
FILE_NAME_CHECK = Check("the name of a file in the same folder", lambda x: isinstance(x, str) and Path(x).name == x)
TENSOR_TYPE_CHECK = one_of("F32", "F16", "BF16")


def import_folder(source: Path, target: Path) -> dict:
    """Write the files of a model folder to `target`; returns the model's entry in the card's `data`."""
    config = read_json_object(source / "config.json")
    check_fields(config, {"model_type": one_of(*LLAMA_FAMILY)}, source / "config.json")
    check_llama_config(config, source / "config.json")
    tokenizer_config = read_json_object(source / "tokenizer_config.json")
    check_fields(tokenizer_config, TOKENIZER_CONFIG_CHECKS, source / "tokenizer_config.json")
    chat_template = read_chat_template(source, tokenizer_config)
    special_tokens_map = read_special_tokens_map(tokenizer_config)
    tokenizer = Tokenizer.load(source)
    stop_ids = read_stop_ids(source, config, tokenizer.special_tokens.get(special_tokens_map.get("eos_token")))
    tensors = read_weights(source, config)

    write_config_files(target, config, special_tokens_map, chat_template, stop_ids)
    tokenizer.save(target)
    safetensors.torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    copy_license_files(source, target)
    name = source.resolve().name
    return {
        "name": name,
        "license": read_license_name(source),
        "attribution": f"folder '{name}'",
        "changes": "none but the layout of the files",
    }


# -- reading ----------------------------------------------------------------------------------------------------------


def read_text_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None


def read_json_object(path: Path) -> dict:
    try:
        value = json.loads(read_text_file(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: it is not a JSON object")
    return value


def read_chat_template(source: Path, tokenizer_config: dict) -> str:
    """From chat_template.jinja, or else from tokenizer_config.json: one template, or the default one of several."""
    template = tokenizer_config.get("chat_template")
    template_file = source / "chat_template.jinja"
    if template_file.exists():
        template = read_text_file(template_file)
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if not template:
        raise UserError(f"{source} has no chat template: adopt a model that is trained for chat")
    return template


def read_special_tokens_map(tokenizer_config: dict) -> dict[str, str]:
    """Text of bos_token and eos_token, as far as they are given."""
    tokens = {}
    for key in ("bos_token", "eos_token"):
        value = tokenizer_config.get(key)
        if value:
            tokens[key] = value["content"] if isinstance(value, dict) else value
    return tokens


def read_stop_ids(source: Path, config: dict, tokenizer_eos: int | None) -> list[int]:
    """Token ids that end an answer: from generation_config.json, else config.json, else the tokenizer."""
    eos = config.get("eos_token_id")
    generation_file = source / "generation_config.json"
    if generation_file.exists():
        generation_eos = read_json_object(generation_file).get("eos_token_id")
        eos = eos if generation_eos is None else generation_eos
    if eos is None:
        eos = tokenizer_eos
    check_fields({"eos_token_id": eos}, {"eos_token_id": TOKEN_IDS}, source)
    return eos if isinstance(eos, list) else [eos]


def read_weights(source: Path, config: dict) -> dict[str, torch.Tensor]:
    """All weights of one or several safetensors files, after a check of their types and shapes."""
    files = weight_files(source)
    shapes = {}
    for file in files:
        header = {name: info for name, info in read_header(source / file).items() if not _is_redundant(name, config)}
        types = {name: tensor_type for name, (_, tensor_type) in header.items()}
        check_fields(types, dict.fromkeys(types, TENSOR_TYPE_CHECK), source / file)
        shapes |= {name: shape for name, (shape, _) in header.items()}
    check_tensor_shapes(shapes, config, source)
    weights = {}
    for file in files:
        tensors, _ = read_tensors(source / file)
        weights |= {name: tensor for name, tensor in tensors.items() if name in shapes}
    return weights


def weight_files(source: Path) -> list[str]:
    """Names of the files that hold the weights: those in the index, if there is one."""
    index_file = source / "model.safetensors.index.json"
    if not index_file.exists():
        return ["model.safetensors"]
    index = read_json_object(index_file)
    check_fields(index, {"weight_map": OBJECT}, index_file)
    check_fields(index["weight_map"], dict.fromkeys(index["weight_map"], FILE_NAME_CHECK), index_file)
    return sorted(set(index["weight_map"].values()))


def _is_redundant(name: str, config: dict) -> bool:
    """Tensors that some files contain and that follow from the rest: RoPE frequencies, the head of a tied model."""
    if name == "lm_head.weight":
        return bool(config.get("tie_word_embeddings"))
    return name.endswith("rotary_emb.inv_freq")


def read_license_name(source: Path) -> str:
    """Name of the license: on the Hub it is in the front matter of README.md."""
    readme = source / "README.md"
    if not readme.exists():
        return "unknown"
    front_matter, _, _ = readme.read_text(encoding="utf-8", errors="replace").partition("\n---")
    fields = dict(re.findall(r"^(license|license_name): *([\w.+ -]*\w)", front_matter, re.MULTILINE))
    return fields.get("license_name") or fields.get("license") or "unknown"


# -- checks -----------------------------------------------------------------------------------------------------------


def check_tensor_shapes(shapes: dict[str, tuple], config: dict, source: Path) -> None:
    """Raise UserError unless these are the tensors of a model with this config. Allocates no tensor."""
    with torch.device("meta"):
        model = new_model(config_from_json(config))
    expected = {name: tuple(t.shape) for name, t in model.exported_tensors().items()}
    extra = shapes.keys() - expected.keys()
    if extra:
        raise UserError(f"{source} has a tensor that a model with its config does not have: {min(extra)!r}")
    missing = expected.keys() - shapes.keys()
    if missing:
        raise UserError(f"{source} lacks the tensor {min(missing)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"{source}: {name} has the shape {shapes[name]}; its config requires {shape}")


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError unless the tokenizer fits the embedding and its chat template works."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding has {vocab_size}")
    unknown = set(tokenizer.special_tokens_map.values()) - tokenizer.special_tokens.keys()
    if unknown:
        raise UserError(f"the tokenizer has no special token {min(unknown)!r}")
    if max(tokenizer.stop_ids) >= tokenizer.vocab_size:
        raise UserError(f"the tokenizer has no token {max(tokenizer.stop_ids)}, which should end an answer")
    render([{"role": "user", "content": "Hello"}], tokenizer, add_generation_prompt=True)


# -- writing ----------------------------------------------------------------------------------------------------------


def write_config_files(
    target: Path, config: dict, special_tokens_map: dict[str, str], chat_template: str, stop_ids: list[int]
) -> None:
    """Write config.json, generation_config.json and tokenizer_config.json."""
    huggingface_class = architecture(config["model_type"]).huggingface_class
    write_json(target / "config.json", {"architectures": [huggingface_class]} | config)
    write_json(target / "generation_config.json", {"eos_token_id": stop_ids})
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special_tokens_map,
            "chat_template": chat_template,
            "model_max_length": config["max_position_embeddings"],
        },
    )
