"""Write a Llama-family model as one GGUF file, for llama.cpp and the programs that are built on it."""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from nanoghost.errors import UserError
from nanoghost.formats.gguf_llama import ROPE_DIVISORS, permute, permuted_heads
from nanoghost.formats.gguf_tokenizer import to_gguf_tokenizer
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.rope import rope_frequencies, rope_scaling_type
from nanoghost.model.tensor_names import gguf_name
from nanoghost.tokenizer.chat_format import CHAT_TEMPLATE
from nanoghost.tokenizer.tokenizer import Tokenizer

QUANTIZATIONS = {  # --quant -> how matrices are stored, and GGUF's number for a file of such matrices
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


@dataclass(frozen=True)
class Provenance:
    """Metadata on the origin of the model."""

    name: str
    license: str
    description: str


def write_gguf(path: Path, model: Llama, tokenizer: Tokenizer, provenance: Provenance, quantization: str) -> None:
    """`quantization`: key of QUANTIZATIONS. What GGUF cannot express raises UserError."""
    architecture = gguf_architecture(model.config)
    _, file_type = QUANTIZATIONS[quantization]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(provenance.name)
    writer.add_license(provenance.license)
    writer.add_description(provenance.description)
    _add_config(writer, model.config)
    writer.add_file_type(file_type)
    if model.config.rope_scaling:
        _add_rope_scaling(writer, model.config)
    _add_tokenizer(writer, tokenizer, model.config.vocab_size)
    _add_tensors(writer, model, architecture, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_architecture(config: LlamaConfig) -> str:
    """The architecture's name in llama.cpp; UserError if llama.cpp computes something else than this config says."""
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    no_rope_layers = ()
    if architecture == "smollm3":  # hard-coded in llama.cpp: every fourth layer
        no_rope_layers = tuple(range(3, config.depth, 4))
    if any(config.sliding_windows):
        raise UserError("this model has sliding windows, which its GGUF architecture does not support")
    if config.no_rope_layers != no_rope_layers:
        raise UserError("this model has layers without rotary embedding, which its GGUF architecture does not support")
    return architecture


def _add_config(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _add_rope_scaling(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """Fields of the header, or for Llama 3 a tensor with one divisor for each frequency."""
    scaling = config.rope_scaling
    rope_type = rope_scaling_type(scaling)
    if rope_type == "llama3":
        unscaled, _ = rope_frequencies(config.head_width, config.rope_base, None)
        scaled, _ = rope_frequencies(config.head_width, config.rope_base, scaling)
        writer.add_tensor(ROPE_DIVISORS, (unscaled / scaled).float().numpy())
        return
    unsupported = scaling.keys() - {"rope_type", "type", "factor", "original_max_position_embeddings"}
    if unsupported:
        raise UserError(f"this model has {rope_type} RoPE scaling with {min(unsupported)}, which GGUF cannot express")
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope_type))
    writer.add_rope_scaling_factor(scaling["factor"])
    if rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    fields = to_gguf_tokenizer(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(fields.pre_tokenizer)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.token_types)
    writer.add_token_merges(fields.merges)
    eos, *other_stop_ids = ordered_stop_ids(tokenizer)
    writer.add_eos_token_id(eos)
    for add, token_id in zip((writer.add_eot_token_id, writer.add_eom_token_id), other_stop_ids):
        add(token_id)
    if "bos_token" in tokenizer.special_tokens_map:
        writer.add_bos_token_id(tokenizer.special_id(tokenizer.special_tokens_map["bos_token"]))
    writer.add_add_bos_token(fields.add_bos)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(tokenizer.chat_template.to_json() if tokenizer.chat_template else CHAT_TEMPLATE)


def ordered_stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer, eos first. GGUF has three fields for them: eos, end of turn, end of message."""
    eos = tokenizer.special_id(tokenizer.special_tokens_map["eos_token"])
    stop_ids = [eos, *sorted(tokenizer.stop_ids - {eos})]
    if len(stop_ids) > 3:
        raise UserError(f"{len(stop_ids)} tokens end an answer of this model, and GGUF can express three of them")
    return stop_ids


def _add_tensors(writer: gguf.GGUFWriter, model: Llama, architecture: str, quantization: str) -> None:
    matrix_type, _ = QUANTIZATIONS[quantization]
    block_size, _ = gguf.GGML_QUANT_SIZES[matrix_type]
    for name, tensor in model.exported_tensors().items():
        values = tensor.float().numpy()
        heads = permuted_heads(name, architecture, model.config.heads, model.config.key_value_heads)
        if heads:
            values = permute(values, heads)
        # Vectors, and matrices whose rows cannot be cut into blocks, stay in fp32.
        is_quantizable = values.ndim == 2 and values.shape[1] % block_size == 0
        stored_type = matrix_type if is_quantizable else GGMLQuantizationType.F32
        raw = gguf.quants.quantize(np.ascontiguousarray(values), stored_type)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=stored_type)
