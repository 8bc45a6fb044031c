"""Take a model out of the home folder: as one GGUF file for llama.cpp and what is built on it.

The model folder itself is what Hugging Face transformers and vLLM load; a ghost can only run here.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import torch
import tyro

from nanoghost.errors import UserError
from nanoghost.formats.gguf_llama import TURNED, gguf_name, tokenizer_fields, turned
from nanoghost.formats.licenses import copy_license_files
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import load_model
from nanoghost.home import open_model, rename_on_success
from nanoghost.model.lora import merged
from nanoghost.model.rope import frequencies, kind_of
from nanoghost.tokenizer.chat_format import CHAT_TEMPLATE

KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_1": "Q4_1", "q4_0": "Q4_0"}


@dataclass(frozen=True)
class ExportSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    gguf: bool = False
    """As a GGUF file. It need not be said: it is the only form, since the model folder is what others load as it is."""
    quant: str = "f16"
    """How matrices are stored: f32, f16, bf16, q8_0, q4_1 or q4_0."""
    out: Path | None = None
    """The file to write; default: NAME.QUANT.gguf here."""
    force: bool = False
    """Replace the file."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def main(settings: ExportSettings) -> dict:
    """Write the file, an adapter merged into its base; returns its path and size. A file that fails is not left behind."""
    folder = open_model(settings.model)
    if settings.quant not in KINDS:
        raise UserError(f"--quant is one of {', '.join(KINDS)}, not '{settings.quant}'")
    card = folder.card
    if card.arch == "ghost":
        raise UserError(
            f"'{folder.name}' is a ghost, which other engines cannot run: train with `nanoghost pretrain --arch llama`"
        )
    path = settings.out or Path(f"{folder.name}.{settings.quant}.gguf")
    if path.exists() and not settings.force:
        raise UserError(f"{path} exists; choose another --out, or --force to replace it")
    model, tokenizer = load_model(folder.path, torch.float32)
    model = merged(model)
    temporary = path.with_name(f".{path.name}.tmp")
    with rename_on_success(temporary, path):
        write(temporary, model, tokenizer, folder.name, card, gguf.GGMLQuantizationType[KINDS[settings.quant]])
    copy_license_files(folder.path, path.parent, add_prefix=f"{path.stem}.")
    return {"name": folder.name, "path": str(path), "bytes": path.stat().st_size, "quant": settings.quant}


def history(card: ModelCard, kind) -> str:
    """What a model was made from and what was changed, in one sentence: licenses ask for it."""
    sources = "; ".join(f"{d['name']} ({d['license']}; {d['attribution']})" for d in card.data)
    changes = [d["changes"] for d in card.data if "changes" in d]
    stages = [ancestor.stage for ancestor in card.lineage() if ancestor.stage != "adopt"]
    steps = [*changes, *(f"nanoghost {stage}" for stage in stages)]
    return f"Made from {sources}. Changed: {'; '.join([*steps, f'matrices stored as {kind.name}'])}."


def write(path: Path, model, tokenizer, name: str, card: ModelCard, kind) -> None:
    c = model.config
    arch = "llama" if c.model_type == "mistral" else c.model_type
    unrotated = tuple(range(3, c.depth, 4)) if arch == "smollm3" else ()  # llama.cpp has it so
    if any(c.windows) or c.unrotated != unrotated:
        raise UserError(f"'{name}' has sliding windows or unrotated layers, which its GGUF form cannot say")
    tokens, kinds, merges, pre, begun = tokenizer_fields(tokenizer, c.vocab_size)
    w = gguf.GGUFWriter(path, arch)
    w.add_name(name)
    w.add_license(" and ".join(dict.fromkeys(d["license"] for d in card.data)))
    w.add_description(history(card, kind))
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.context)
    w.add_embedding_length(c.width)
    w.add_block_count(c.depth)
    w.add_feed_forward_length(c.mlp_width)
    w.add_head_count(c.heads)
    w.add_head_count_kv(c.key_value_heads)
    w.add_key_length(c.head_width)
    w.add_value_length(c.head_width)
    w.add_rope_dimension_count(c.head_width)
    w.add_rope_freq_base(c.rope_base)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_file_type({"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}[kind.name])
    stretch(w, c)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    w.add_token_merges(merges)
    w.add_eos_token_id(tokenizer.special(tokenizer.names["eos_token"]))
    if "bos_token" in tokenizer.names:
        w.add_bos_token_id(tokenizer.special(tokenizer.names["bos_token"]))
    w.add_add_bos_token(begun)
    w.add_add_space_prefix(False)
    w.add_chat_template(tokenizer.dialect.source if tokenizer.dialect else CHAT_TEMPLATE)
    for their, tensor in model.exported_tensors().items():
        x = tensor.float().numpy()
        if arch in TURNED and (".q_proj." in their or ".k_proj." in their):
            x = turned(x, c.heads if ".q_proj." in their else c.key_value_heads)
        stored = (
            kind if x.ndim == 2 and x.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else gguf.GGMLQuantizationType.F32
        )
        w.add_tensor(gguf_name(their), gguf.quants.quantize(np.ascontiguousarray(x), stored), raw_dtype=stored)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def stretch(w: gguf.GGUFWriter, c) -> None:
    """How positions are stretched; Llama 3's way is one divisor for each frequency."""
    if not c.rope_scaling:
        return
    how = kind_of(c.rope_scaling)
    if how == "llama3":
        plain, _ = frequencies(c.head_width, c.rope_base, None)
        stretched, _ = frequencies(c.head_width, c.rope_base, c.rope_scaling)
        w.add_tensor("rope_freqs.weight", (plain / stretched).float().numpy())
        return
    if more := c.rope_scaling.keys() - {"rope_type", "type", "factor", "original_max_position_embeddings"}:
        raise UserError(f"positions stretched by {how} with {min(more)}: its GGUF form cannot say that here")
    w.add_rope_scaling_type(gguf.RopeScalingType(how))
    w.add_rope_scaling_factor(c.rope_scaling["factor"])
    if how == "yarn":
        w.add_rope_scaling_orig_ctx_len(c.rope_scaling["original_max_position_embeddings"])


def command(settings: ExportSettings) -> None:
    figures = main(settings)
    print(f"{figures['path']}: {figures['bytes'] / 1e6:.1f} MB", file=sys.stderr)
    if settings.json:
        print(json.dumps(figures))
