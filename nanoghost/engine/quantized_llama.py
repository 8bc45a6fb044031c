"""A Llama for inference: quantized weights, a paged KV cache, the inner loops in kernels.cpp.

A step that decodes one sequence reads every weight once and computes little with it. Memory bandwidth limits it, so
half the bits give twice the speed. A step that decodes many sequences reads the weights once for all of them, and
arithmetic limits it: 8-bit integers multiply twice as fast as bf16.

N tokens of any sequences, T tokens of one sequence, D width, M and K outputs and inputs of a matrix, R rank of an
adapter, L logits, V vocabulary.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open

from nanoghost.engine import kernels
from nanoghost.engine.quantization import GROUP, LANES, QuantizedMatrix, auto_bits, dequantize, quantize
from nanoghost.errors import UserError
from nanoghost.home import read_json, write_atomic
from nanoghost.model.llama import Llama, scaled
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.lora import Adapter
from nanoghost.model.rope import rope_table
from nanoghost.model.tensor_names import MATRIX_MODULES, huggingface_name

EMPTY = torch.empty(0)  # for the kernels: a tensor that a model does not have
FUSED_MATRICES = {"qkv": ("q", "k", "v"), "out": ("out",), "gate_up": ("gate", "up"), "down": ("down",)}
"""The matrices of a layer: those that multiply the same input are stored as one."""
RESIDUAL_MATRICES = ("out", "down")
"""Those that write into the residual stream. Their weights contain the residual multiplier; and the final norm contains
the divisor of the logits."""
VECTORS = {
    "attention_norm": "attention_norm.weight",
    "mlp_norm": "mlp_norm.weight",
    "q_norm": "attention.q_norm.weight",
    "k_norm": "attention.k_norm.weight",
    "out_bias": "attention.out.bias",
}
"""The other weights of a layer, and their parameters in llama.Block."""
KERNEL_ORDER = (
    "attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias", "mlp_norm", "gate_up", "down",
)  # fmt: skip
AdapterSlices = list[tuple[slice, Adapter]]
"""Which tokens of a batch use which LoRA adapter; the others use none."""


def supports_quantization(config) -> bool:
    """Whether the kernels can run a model of this configuration on this machine."""
    if not isinstance(config, LlamaConfig) or config.head_width not in (64, 128):
        return False
    if config.width % GROUP or config.mlp_width % GROUP:
        return False
    return not kernels.unavailable_reason()


class QuantizedLlama:
    """Computes what llama.Llama computes, for tokens of any sequences at any positions in one pass."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor | QuantizedMatrix]):
        if reason := kernels.unavailable_reason():
            raise UserError(f"quantized weights need compiled kernels: {reason}")
        self.config = config
        self.weights = weights
        self.adapters: dict[str, Adapter] = {}
        """By the name that sequences use."""
        self.layers = []
        for i in range(config.depth):
            prefix = f"blocks.{i}."
            self.layers.append({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})
        self.layer_tensors = [tensor for layer in self.layers for tensor in kernel_tensors(layer)]
        self.layer_bits = [layer[name].bits for layer in self.layers for name in FUSED_MATRICES]
        self.has_rope = [int(i not in config.no_rope_layers) for i in range(config.depth)]
        self.windows = list(config.sliding_windows or [0] * config.depth)
        shapes = config.matrix_shapes()
        self.output_sizes = {}
        for fused_name, names in FUSED_MATRICES.items():
            self.output_sizes[fused_name] = [shapes[name][0] for name in names]
        self.cos, self.sin = rope_table(config.context, config.head_width, config.rope_base, config.rope_scaling)

    def weight_bytes(self) -> int:
        """Size of all quantized weights: what a step reads."""
        return sum(w.nbytes for w in self.weights.values() if isinstance(w, QuantizedMatrix))

    def matmul_weights(self) -> int:
        """Number of weights that a token is multiplied with, the head included."""
        matrices = {name: w for name, w in self.weights.items() if isinstance(w, QuantizedMatrix)}
        if not self.config.tied_embeddings:
            del matrices["embedding"]
        return sum(w.num_weights for w in matrices.values())

    def new_kv_cache(self, num_blocks: int) -> torch.Tensor:
        """(layers, blocks, KV heads, 2, LANES x head width) fp16: blocks of LANES tokens.

        Keys are stored as (head width, LANES), values as (LANES, head width).
        """
        c = self.config
        return torch.empty(c.depth, num_blocks, c.key_value_heads, 2, LANES * c.head_width, dtype=torch.float16)

    def forward(
        self,
        tokens_N: torch.Tensor,
        slots_N: torch.Tensor,
        positions_N: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        logits_indices_L: torch.Tensor,
        adapter_slices: AdapterSlices = (),
    ) -> torch.Tensor:
        """Logits (L, V) in fp32 after the tokens with these indices.

        Token n is at position positions_N[n] of the sequence whose blocks are listed in block_table[slots_N[n]].
        """
        x_ND = scaled(dequantize(self.weights["embedding"], tokens_N), self.config.embedding_multiplier)
        cache_arguments = (block_table, slots_N, positions_N, self.config.attention_multiplier)
        if adapter_slices:
            for i, layer_cache in enumerate(kv_cache):
                self.layer_with_lora(i, x_ND, layer_cache, cache_arguments, adapter_slices)
        else:
            torch.ops.nanoghost.layers.default(
                x_ND, self.layer_tensors, self.layer_bits, self.has_rope, self.windows, self.cos, self.sin, kv_cache,
                *cache_arguments, self.config.norm_eps,
            )  # fmt: skip
        x_LD = x_ND[logits_indices_L]
        head = self.weights["embedding" if self.config.tied_embeddings else "head"]
        logits_LV = torch.empty(len(x_LD), self.config.vocab_size)
        return self.linear(x_LD, head, logits_LV, norm=self.weights["final_norm"])

    def layer_with_lora(self, i: int, x_ND, layer_cache, cache_arguments, adapter_slices: AdapterSlices) -> None:
        """Layer i, in place: the steps of the kernel `layers` one by one, with the LoRA updates in between."""
        c, layer, N = self.config, self.layers[i], len(x_ND)
        cos_sin = (self.cos, self.sin) if self.has_rope[i] else (EMPTY, EMPTY)
        qk_norms = (layer.get("q_norm", EMPTY), layer.get("k_norm", EMPTY))

        qkv = torch.empty(N, (c.heads + 2 * c.key_value_heads) * c.head_width)
        self.linear(x_ND, layer["qkv"], qkv, layer.get("qkv_bias", EMPTY), layer["attention_norm"])
        self.add_lora(qkv, x_ND, i, "qkv", adapter_slices)
        attend = torch.ops.nanoghost.attend.default
        y = attend(qkv, *cos_sin, layer_cache, *cache_arguments, self.windows[i], *qk_norms, c.norm_eps)
        self.linear(y, layer["out"], x_ND, layer.get("out_bias", EMPTY), add=True)
        self.add_lora(x_ND, y, i, "out", adapter_slices)

        gate_up = torch.empty(N, 2 * c.mlp_width)
        self.linear(x_ND, layer["gate_up"], gate_up, norm=layer["mlp_norm"])
        self.add_lora(gate_up, x_ND, i, "gate_up", adapter_slices)
        self.linear(gate_up, layer["down"], x_ND, add=True)
        self.add_lora(x_ND, gate_up, i, "down", adapter_slices)

    def linear(self, x, matrix: QuantizedMatrix, out, bias=EMPTY, norm=EMPTY, add: bool = False):
        """out = f(x) W^T + bias, or with `add` out += f(x) W^T + bias.

        f is RMSNorm if there is a `norm`; SwiGLU if x is twice as wide as W expects; otherwise it does nothing.
        """
        torch.ops.nanoghost.linear.default(
            x, matrix.codes, matrix.scales, matrix.mins, matrix.bits, bias, norm, self.config.norm_eps, out, add
        )
        return out

    def add_lora(self, y_NM, x_NK, i: int, fused_name: str, adapter_slices: AdapterSlices) -> None:
        """Add the LoRA updates of the fused matrices, whose outputs are concatenated in y; x is as in `linear`."""
        for token_slice, adapter in adapter_slices:
            updates = [adapter.updates.get((i, name)) for name in FUSED_MATRICES[fused_name]]
            if not any(updates):
                continue
            x = self.prepare_input(x_NK[token_slice], i, fused_name)
            factor = self.config.residual_multiplier if fused_name in RESIDUAL_MATRICES else 1.0
            for update, y in zip(updates, y_NM[token_slice].split(self.output_sizes[fused_name], 1)):
                if update:
                    a_RK, b_MR, scale = update
                    y.addmm_(x @ a_RK.T, b_MR.T, alpha=scale * factor)

    def prepare_input(self, x_NK, i: int, fused_name: str) -> torch.Tensor:
        """f(x) of `linear`, in plain PyTorch."""
        c, layer = self.config, self.layers[i]
        if fused_name == "qkv":
            return F.rms_norm(x_NK, (c.width,), layer["attention_norm"], c.norm_eps)
        if fused_name == "gate_up":
            return F.rms_norm(x_NK, (c.width,), layer["mlp_norm"], c.norm_eps)
        if fused_name == "down":
            return F.silu(x_NK[:, : c.mlp_width]) * x_NK[:, c.mlp_width :]
        return x_NK

    def forward_one(
        self, token_ids, start: int, kv_cache: torch.Tensor, adapter: Adapter | None = None
    ) -> torch.Tensor:
        """Logits (T, V) of the next T tokens, from position `start` on, of the only sequence in a KV cache."""
        T, num_blocks = len(token_ids), kv_cache.size(1)
        return self.forward(
            torch.as_tensor(token_ids),
            slots_N=torch.zeros(T, dtype=torch.int32),
            positions_N=torch.arange(start, start + T, dtype=torch.int32),
            kv_cache=kv_cache,
            block_table=torch.arange(num_blocks, dtype=torch.int32)[None],
            logits_indices_L=torch.arange(T),
            adapter_slices=[(slice(0, T), adapter)] if adapter else (),
        )

    def logprobs(self, tokens_BT, targets_BT) -> torch.Tensor:
        """log P(target | tokens so far), (B, T) in fp32, as llama.Llama.logprobs; one row after the other."""
        kv_cache = self.new_kv_cache(math.ceil(tokens_BT.size(1) / LANES))
        rows = []
        for tokens_T, targets_T in zip(tokens_BT, targets_BT):
            logits_TV = self.forward_one(tokens_T, 0, kv_cache)
            rows.append(-F.cross_entropy(logits_TV, targets_T, reduction="none"))
        return torch.stack(rows)


def kernel_tensors(layer: dict[str, torch.Tensor | QuantizedMatrix]) -> list[torch.Tensor]:
    """The tensors of a layer as the kernel `layers` expects them."""
    tensors = []
    for name in KERNEL_ORDER:
        weight = layer.get(name, EMPTY)
        tensors += [weight.codes, weight.scales, weight.mins] if isinstance(weight, QuantizedMatrix) else [weight]
    return tensors


# -- quantizing, loading, storing --------------------------------------------------------------------------------------


def quantize_model(model: Llama, bits: int | None) -> QuantizedLlama:
    """A quantized copy of a model in memory, with its adapter merged. `bits` as for `quantize_weights`."""
    parameters = dict(model.named_parameters())
    updates = {}
    for adapter in model.adapters:
        for (i, name), update in adapter.updates.items():
            updates[f"blocks.{i}.{MATRIX_MODULES[name]}.weight"] = update

    def get_tensor(name: str) -> torch.Tensor | None:
        weight = parameters.get(name)
        if name in updates:
            a_RK, b_MR, scale = updates[name]
            weight = weight.float() + scale * (b_MR.float() @ a_RK.float())
        return weight

    with torch.no_grad():
        return QuantizedLlama(model.config, quantize_weights(model.config, get_tensor, bits))


def quantize_weights(
    config: LlamaConfig, get_tensor: Callable[[str], torch.Tensor | None], bits: int | None
) -> dict[str, torch.Tensor | QuantizedMatrix]:
    """The weights of a QuantizedLlama. `get_tensor` returns a parameter of llama.Llama by name, None if there is none.

    `bits`: 4, 8 or 16; None: `auto_bits` of each matrix.
    """

    def quantize_parameters(names: list[str], factor: float = 1.0) -> QuantizedMatrix:
        weight_MK = torch.cat([get_tensor(name).float().flatten(0, -2) for name in names]) * factor
        return quantize(weight_MK, bits or auto_bits(weight_MK))

    weights = {
        "embedding": quantize_parameters(["embedding.weight"]),
        "final_norm": get_tensor("final_norm.weight").float() / config.logits_scaling,
    }
    if not config.tied_embeddings:
        weights["head"] = quantize_parameters(["lm_head.weight"])
    for i in range(config.depth):
        prefix = f"blocks.{i}."
        for fused_name, names in FUSED_MATRICES.items():
            parameters = [f"{prefix}{MATRIX_MODULES[name]}.weight" for name in names]
            factor = config.residual_multiplier if fused_name in RESIDUAL_MATRICES else 1.0
            weights[prefix + fused_name] = quantize_parameters(parameters, factor)
        for name, parameter in VECTORS.items():
            vector = get_tensor(prefix + parameter)
            if vector is not None:
                weights[prefix + name] = vector.float() * (config.residual_multiplier if name == "out_bias" else 1.0)
        if get_tensor(prefix + "attention.q.bias") is not None:
            weights[prefix + "qkv_bias"] = torch.cat([get_tensor(f"{prefix}attention.{x}.bias").float() for x in "qkv"])
    return weights


def load_quantized(folder: Path) -> QuantizedLlama:
    """Load a model folder. The quantized weights are stored in it, and made again when the original weights change."""
    config = LlamaConfig.from_json(read_json(folder / "config.json"))
    original_path, quantized_path = folder / "model.safetensors", folder / "quantized.safetensors"
    original_version = f"{original_path.stat().st_size} {original_path.stat().st_mtime_ns}"
    weights = read_weights(quantized_path, original_version) if quantized_path.exists() else None
    if weights is None:
        with safe_open(original_path, "pt") as f:
            tensor_names = set(f.keys())

            def get_tensor(name: str) -> torch.Tensor | None:
                name = huggingface_name(name)
                return f.get_tensor(name) if name in tensor_names else None

            weights = quantize_weights(config, get_tensor, bits=None)
        write_weights(quantized_path, original_version, weights)
    return QuantizedLlama(config, weights)


def write_weights(path: Path, original_version: str, weights: dict[str, torch.Tensor | QuantizedMatrix]) -> None:
    """Write a safetensors file. Its metadata hold the version of the original, and (bits, outputs) of each matrix."""
    tensors, matrices = {}, {}
    for name, weight in weights.items():
        if isinstance(weight, QuantizedMatrix):
            matrices[name] = (weight.bits, weight.outputs)
            tensors |= {f"{name}.codes": weight.codes, f"{name}.scales": weight.scales, f"{name}.mins": weight.mins}
        else:
            tensors[name] = weight
    metadata = {"version": original_version, "matrices": json.dumps(matrices)}
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def read_weights(path: Path, original_version: str) -> dict[str, torch.Tensor | QuantizedMatrix] | None:
    """Read the file of `write_weights`; None if it belongs to another version of the original."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
        if metadata["version"] != original_version:
            return None
        weights = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118 (not a dict)
    for name, (bits, outputs) in json.loads(metadata["matrices"]).items():
        codes, scales, mins = (weights.pop(f"{name}.{part}") for part in ("codes", "scales", "mins"))
        weights[name] = QuantizedMatrix(codes, scales, mins, bits, outputs)
    return weights
