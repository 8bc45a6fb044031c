"""Import a Hugging Face model folder of unknown origin: read its files, check them, write a normalized model folder.

Everything in such a folder is untrusted: values are checked before they are used, and shapes before tensors are read.
`check_tensor_shapes`, `check_tokenizer` and `write_config_files` also serve the import of GGUF files.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from nanoghost.errors import UserError
from nanoghost.formats.file_kinds import check_content
from nanoghost.formats.licenses import copy_license_files
from nanoghost.formats.safetensors_file import read_header, read_tensors
from nanoghost.formats.source_names import source_name
from nanoghost.formats.stop_tokens import ids_after_answer, ids_of_field
from nanoghost.formats.validation import (
    OBJECT,
    STRING,
    TOKEN_IDS,
    Check,
    check_fields,
    check_llama_config,
    integer,
    list_of,
    one_of,
    optional,
)
from nanoghost.home import write_json
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.registry import LLAMA_FAMILY, config_to_json, new_model
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.jinja_template import ChatTemplate
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
STOP_ID_CHECKS = {"eos_token_id": optional(TOKEN_IDS)}
FILE_NAME_CHECK = Check("the name of a file in the same folder", lambda x: isinstance(x, str) and Path(x).name == x)
HYBRID_CHECKS = {"layer_types": optional(list_of(STRING)), "num_local_experts": optional(integer(0, 2**16))}
HYBRID_MATRICES = {  # of Granite 4, and the matrices of Granite 3 in them
    "shared_mlp.input_linear.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "shared_mlp.output_linear.weight": ("mlp.down_proj.weight",),
}
TENSOR_TYPE_CHECK = one_of("F32", "F16", "BF16")


def import_folder(source: Path, target: Path) -> dict:
    """Write the files of a model folder to `target`; returns the model's entry in the card's `data`."""
    check_folder(source)
    values = read_json_object(source / "config.json")
    if values.get("model_type") == "granitemoehybrid":
        values = dense_granite(values, source / "config.json")
    check_fields(values, {"model_type": one_of(*LLAMA_FAMILY)}, source / "config.json")
    check_llama_config(values, source / "config.json")
    config = LlamaConfig.from_json(values)
    if config.tied_embeddings and has_other_head(source):
        config = replace(config, tied_embeddings=False)  # as transformers 5 reads it
    tokenizer_config = read_json_object(source / "tokenizer_config.json")
    check_fields(tokenizer_config, TOKENIZER_CONFIG_CHECKS, source / "tokenizer_config.json")
    chat_template = read_chat_template(source, tokenizer_config)
    special_tokens_map = read_special_tokens_map(tokenizer_config)
    tokenizer = Tokenizer.load(source, special_tokens_map.values())
    tokenizer.chat_template = ChatTemplate.from_json(chat_template, special_tokens_map, set())
    stop_ids = read_stop_ids(source, values, tokenizer) | ids_after_answer(tokenizer)
    tensors = read_weights(source, config)

    write_config_files(target, values, config, special_tokens_map, chat_template, stop_ids)
    tokenizer.save(target)
    safetensors.torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    copy_license_files(source, target)
    name = source_name(source)
    return {
        "name": name,
        "license": read_license_name(source),
        "attribution": f"folder '{name}'",
        "changes": "none but the layout of the files",
    }


# -- reading ----------------------------------------------------------------------------------------------------------


def check_folder(source: Path) -> None:
    """Raise UserError for a folder that has a model in another form, or files that are not what they are called."""
    snapshots = sorted(source.glob("snapshots/*/config.json"))
    if snapshots:
        raise UserError(f"{source} is a model in the cache of the Hub: adopt its folder {snapshots[0].parent}")
    names = sorted(path.name for path in source.iterdir())
    gguf_files = [name for name in names if name.endswith(".gguf")]
    if "config.json" not in names and gguf_files:
        raise UserError(f"{source} has GGUF files: adopt one of them, such as {source / gguf_files[0]}")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{source} has its weights in {pickles[0]}, a pickle, which could run any program: nanoghost reads"
            " model.safetensors"
        )
    for name in names:
        if name.endswith((".json", ".jinja", ".safetensors")) and (source / name).is_file():
            check_content(source / name)


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


def read_chat_template(source: Path, tokenizer_config: dict) -> str | list[dict]:
    """The value of chat_template in tokenizer_config.json: one template, or also one for conversations with tools.

    Files of templates, if there are any, take the place of the value, as in transformers.
    """
    value = tokenizer_config.get("chat_template")
    named = {t["name"]: t["template"] for t in value} if isinstance(value, list) else {"default": value}
    files = [source / "chat_template.jinja", *sorted((source / "additional_chat_templates").glob("*.jinja"))]
    texts = {file.stem: read_text_file(file) for file in files if file.exists()}
    if texts:
        named = {"default" if name == "chat_template" else name: text for name, text in texts.items()}
    if not named.get("default"):
        raise UserError(f"{source} has no chat template: adopt a model that is trained for chat")
    if not named.get("tool_use"):
        return named["default"]
    return [{"name": name, "template": named[name]} for name in ("default", "tool_use")]


def read_special_tokens_map(tokenizer_config: dict) -> dict[str, str]:
    """Text of bos_token and eos_token, as far as they are given."""
    tokens = {}
    for key in ("bos_token", "eos_token"):
        value = tokenizer_config.get(key)
        if value:
            tokens[key] = value["content"] if isinstance(value, dict) else value
    return tokens


def read_stop_ids(source: Path, config: dict, tokenizer: Tokenizer) -> set[int]:
    """Token ids that end an answer: all that generation_config.json, config.json and the tokenizer name."""
    generation_file = source / "generation_config.json"
    generation_config = read_json_object(generation_file) if generation_file.exists() else {}
    check_fields(generation_config, STOP_ID_CHECKS, generation_file)
    check_fields(config, STOP_ID_CHECKS, source / "config.json")
    stop_ids = {i for i in ids_of_field(generation_config.get("eos_token_id")) if tokenizer.has_token(i)}
    # What config.json says may be the default of its class (2 for Llama), and in this vocabulary an ordinary word.
    stop_ids |= ids_of_field(config.get("eos_token_id")) & {*tokenizer.template_tokens.values()}
    eos = tokenizer.template_tokens.get(tokenizer.special_tokens_map["eos_token"])
    return stop_ids if eos is None else stop_ids | {eos}


def read_weights(source: Path, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """All weights of one or several safetensors files, after a check of their types and shapes."""
    files = weight_files(source)
    shapes = {}
    for file in files:
        header = {name: info for name, info in read_header(source / file).items() if not _is_redundant(name, config)}
        types = {name: tensor_type for name, (_, tensor_type) in header.items()}
        check_fields(types, dict.fromkeys(types, TENSOR_TYPE_CHECK), source / file)
        for name, (shape, _) in header.items():
            parts = split_names(name, shape)
            shapes |= dict.fromkeys(parts, (shape[0] // len(parts), *shape[1:]) if shape else shape)
    check_tensor_shapes(shapes, config, source)
    weights = {}
    for file in files:
        tensors, _ = read_tensors(source / file)
        for name, tensor in tensors.items():
            parts = split_names(name, tensor.shape)
            if parts[0] in shapes:
                weights |= dict(zip(parts, map(torch.Tensor.contiguous, tensor.chunk(len(parts)))))
    return weights


def split_names(name: str, shape: Sequence[int]) -> list[str]:
    """The names of the matrices that a tensor consists of, one above the other; mostly its own name."""
    for suffix, parts in HYBRID_MATRICES.items():
        if name.endswith(suffix) and shape and shape[0] % len(parts) == 0:
            return [name.removesuffix(suffix) + part for part in parts]
    return [name]


def dense_granite(values: dict, config_file: Path) -> dict:
    """config.json of a Granite 4 without Mamba layers and experts, which computes what a Granite 3 computes."""
    check_fields(values, HYBRID_CHECKS, config_file)
    reasons = {
        "Mamba layers": not set(values.get("layer_types") or ["mamba"]) <= {"attention", "full_attention"},
        "experts": values.get("num_local_experts", 8),
        "no rotary embeddings": values.get("position_embedding_type") != "rope",
    }
    for feature, is_present in reasons.items():
        if is_present:
            raise UserError(f"{config_file}: this Granite has {feature}, which nanoghost does not support")
    others = {key: value for key, value in values.items() if key != "layer_types"}
    return others | {"model_type": "granite", "intermediate_size": values.get("shared_intermediate_size", 1024)}


def weight_files(source: Path) -> list[str]:
    """Names of the files that hold the weights: model.safetensors, or those in the index, as in transformers.

    An index next to a whole file is left from an earlier version of the model.
    """
    index_file = source / "model.safetensors.index.json"
    if (source / "model.safetensors").exists() or not index_file.exists():
        return ["model.safetensors"]
    index = read_json_object(index_file)
    check_fields(index, {"weight_map": OBJECT}, index_file)
    check_fields(index["weight_map"], dict.fromkeys(index["weight_map"], FILE_NAME_CHECK), index_file)
    return sorted(set(index["weight_map"].values()))


def has_other_head(source: Path) -> bool:
    """Whether the files of a tied model hold a head that is not the embedding."""
    matrices = {}
    for file in weight_files(source):
        if {"lm_head.weight", "model.embed_tokens.weight"} & read_header(source / file).keys():
            matrices |= read_tensors(source / file)[0]
    head, embedding = matrices.get("lm_head.weight"), matrices.get("model.embed_tokens.weight")
    return head is not None and embedding is not None and not torch.equal(head.float(), embedding.float())


def _is_redundant(name: str, config: LlamaConfig) -> bool:
    """Tensors that some files contain and that follow from the rest: RoPE frequencies, the head of a tied model."""
    if name == "lm_head.weight":
        return config.tied_embeddings
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


def check_tensor_shapes(shapes: dict[str, tuple], config: LlamaConfig, source: Path) -> None:
    """Raise UserError unless these are the tensors of a model with this config. Allocates no tensor."""
    with torch.device("meta"):
        model = new_model(config)
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
    render([{"role": "user", "content": "Hello"}], tokenizer, add_generation_prompt=True)


# -- writing ----------------------------------------------------------------------------------------------------------


def write_config_files(
    target: Path,
    values: dict,
    config: LlamaConfig,
    special_tokens_map: dict[str, str],
    chat_template: str | list[dict],
    stop_ids: set[int],
) -> None:
    """Write config.json, generation_config.json and tokenizer_config.json.

    `values`: config.json of the source. What nanoghost reads in it is written in one form, and nothing is left to the
    defaults of a class; the rest stays.
    """
    token_ids = {"eos_token_id": sorted(stop_ids)}
    others = {key: value for key, value in values.items() if key != "rope_parameters"}
    write_json(target / "config.json", others | config_to_json(config) | token_ids)
    write_json(target / "generation_config.json", token_ids)
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special_tokens_map,
            "chat_template": chat_template,
            "model_max_length": config.context,
        },
    )
