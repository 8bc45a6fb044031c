"""A Llama for speaking: weights packed in 4, 8 or 16 bits, keys and values in pages, the inner loops in kernels.cpp.

One conversation's step reads every weight once and does little with it, so it lasts as long as the memory takes to
deliver them: half the bits, twice the speed. Many conversations share that reading, and then arithmetic counts: whole
numbers of 8 bits multiply twice as fast as bf16.

  bits  a weight is                                                        the input is rounded to
  4     one of 16 levels from the lowest to the highest of its 32 (Q4_1)   8 bits and a scale for each 32
  8     a whole number times the scale of its 32 (Q8_0)                    the same
  16    bf16                                                               bf16

N tokens, M outputs, K inputs, G groups of 32 inputs, J key-value heads, D width.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open

from nanoghost.engine import kernels
from nanoghost.errors import UserError
from nanoghost.home import read_json, write_atomic
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.lora import Adapter
from nanoghost.model.names import MATRIX_MODULES, huggingface_name
from nanoghost.model.rope import rope_table

GROUP, LANES = 32, 16  # as in kernels.cpp


@dataclass(frozen=True)
class Packed:
    """A matrix in the order in which the kernel reads it: 16 outputs side by side, 32 inputs at a time."""

    codes: torch.Tensor
    """(blocks of 16 outputs, G, 64 x bits) bytes."""
    scales: torch.Tensor
    """(blocks, G, 16) fp16."""
    lows: torch.Tensor
    """(blocks, G, 16) fp16: the lowest value of each group, with 4 bits."""
    bits: int
    outputs: int


def pack(weight_MK: torch.Tensor, bits: int) -> Packed:
    """K must be a multiple of 32."""
    M, K = weight_MK.shape
    blocks, G = -(-M // LANES), K // GROUP
    w = F.pad(weight_MK.float(), (0, 0, 0, blocks * LANES - M)).view(blocks, LANES, G, GROUP)
    scales = lows = torch.empty(0, dtype=torch.float16)
    if bits == 16:
        codes = w.view(blocks, LANES, G, GROUP // 2, 2).permute(0, 2, 3, 1, 4).bfloat16().contiguous()
        return Packed(codes.view(torch.uint8).view(blocks, G, -1), scales, lows, bits, M)
    if bits == 8:
        step = (w.abs().amax(-1) / 127).half()
        codes = (w / step.float().clamp_min(1e-30)[..., None]).round_().clamp_(-127, 127).add_(128)
    else:
        low, high = w.amin(-1), w.amax(-1)
        step, low = ((high - low) / 15).half(), low.half()
        codes = ((w - low.float()[..., None]) / step.float().clamp_min(1e-30)[..., None]).round_().clamp_(0, 15)
        lows = low.permute(0, 2, 1).contiguous()
    scales = step.permute(0, 2, 1).contiguous()
    codes = codes.to(torch.uint8).view(blocks, LANES, G, 8, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        codes = codes[:, :, :4] | codes[:, :, 4:] << 4
    return Packed(codes.reshape(blocks, G, -1), scales, lows, bits, M)


def unpack(p: Packed, rows_N: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers that a packed matrix stands for, (M, K) fp32; or only those rows."""
    rows_N = torch.arange(p.outputs) if rows_N is None else rows_N
    block, lane = rows_N // LANES, rows_N % LANES
    if p.bits == 16:
        codes = p.codes.view(torch.bfloat16).view(*p.codes.shape[:2], GROUP // 2, LANES, 2)
        return codes[block, :, :, lane].flatten(1).float()
    codes = p.codes.view(*p.codes.shape[:2], -1, LANES, 4)[block, :, :, lane]  # (N, G, 8 or 4, 4)
    if p.bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], 2)
    codes = codes.flatten(2).float()
    scales = p.scales[block, :, lane].float()[..., None]
    return (
        codes * scales + p.lows[block, :, lane].float()[..., None] if p.bits == 4 else (codes - 128) * scales
    ).flatten(1)


def fewest_bits(weight_MK: torch.Tensor) -> int:
    """4 if that loses nothing (the weights came from a file in 4 bits), otherwise 8."""
    sample = weight_MK[:LANES]
    return 4 if torch.allclose(unpack(pack(sample, 4)), sample.float(), rtol=1e-5, atol=1e-7) else 8


NONE = torch.empty(0)  # stands for a part that a model does not have
VECTORS = {  # name of a part -> parameter of llama.Block
    "attention_norm": "attention_norm.weight",
    "mlp_norm": "mlp_norm.weight",
    "q_norm": "attention.q_norm.weight",
    "k_norm": "attention.k_norm.weight",
    "out_bias": "attention.out.bias",
}
STACKS = {"qkv": ("q", "k", "v"), "out": ("out",), "gate_up": ("gate", "up"), "down": ("down",)}


def pack_model(config: LlamaConfig, tensor, bits: int | None = None) -> dict:
    """The parts of a PackedLlama by name. `tensor(name)` gives a parameter of llama.Llama, None if it has no such one.

    `bits` None: as few as lose nothing, at most 8.
    """

    def packed(*names):
        weight = torch.cat([tensor(name).float().flatten(0, -2) for name in names])
        return pack(weight, bits or fewest_bits(weight))

    parts = {"embedding": packed("embedding.weight"), "final_norm": tensor("final_norm.weight").float()}
    if not config.tied_embeddings:
        parts["head"] = packed("lm_head.weight")
    for b in (f"blocks.{i}." for i in range(config.depth)):
        parts |= {
            b + stack: packed(*(f"{b}{MATRIX_MODULES[name]}.weight" for name in names))
            for stack, names in STACKS.items()
        }
        parts |= {b + v: tensor(b + p).float() for v, p in VECTORS.items() if tensor(b + p) is not None}
        if tensor(b + "attention.q.bias") is not None:
            parts[b + "qkv_bias"] = torch.cat([tensor(f"{b}attention.{x}.bias").float() for x in "qkv"])
    return parts


def tensors_of(block: dict) -> list[torch.Tensor]:
    """A layer's tensors in the order in which the operator `layers` takes them."""
    order = ("attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias", "mlp_norm", "gate_up", "down")
    parts = [block.get(name, NONE) for name in order]
    return [t for p in parts for t in ((p.codes, p.scales, p.lows) if isinstance(p, Packed) else (p,))]


def packable(c) -> bool:
    """Whether a model of this configuration can be packed and run on this machine."""
    if c.model_type == "nanoghost" or c.head_width not in (64, 128) or c.width % GROUP or c.mlp_width % GROUP:
        return False
    return not kernels.unavailable()


def pack_module(model: Llama, bits: int | None) -> "PackedLlama":
    """What a model being trained says now, its adapter merged; nothing is compiled anew."""
    parameters = dict(model.named_parameters())
    corrections = {
        f"blocks.{i}.{MATRIX_MODULES[name]}.weight": pair
        for a in model.adapters
        for (i, name), pair in a.updates.items()
    }

    def tensor(name):
        weight = parameters.get(name)
        if name in corrections:
            a_RM, b_NR, scale = corrections[name]
            weight = weight.float() + scale * (b_NR.float() @ a_RM.float())
        return weight

    with torch.no_grad():
        return PackedLlama(model.config, pack_model(model.config, tensor, bits))


def load_packed(folder: Path, bits: int | None = None) -> "PackedLlama":
    """From a model folder. The packed form is kept beside the weights, and made anew when these have changed."""
    config = LlamaConfig.from_json(read_json(folder / "config.json"))
    weights, path = folder / "model.safetensors", folder / f"packed-{bits or 'few'}-bits.safetensors"
    mark = f"{weights.stat().st_size} {weights.stat().st_mtime_ns}"
    if path.exists():
        with safe_open(path, "pt") as f:
            notes = f.metadata()
            if notes["mark"] == mark:
                parts = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118 (not a dict)
                for name, (own_bits, outputs) in json.loads(notes["packed"]).items():
                    pieces = (parts.pop(f"{name}.{piece}") for piece in ("codes", "scales", "lows"))
                    parts[name] = Packed(*pieces, own_bits, outputs)
                return PackedLlama(config, parts)
    with safe_open(weights, "pt") as f:
        there = set(f.keys())

        def tensor(name):
            name = huggingface_name(name)
            return f.get_tensor(name) if name in there else None

        parts = pack_model(config, tensor, bits)
    packed = {name: p for name, p in parts.items() if isinstance(p, Packed)}
    tensors = {name: p for name, p in parts.items() if name not in packed}
    for name, p in packed.items():
        tensors |= {f"{name}.codes": p.codes, f"{name}.scales": p.scales, f"{name}.lows": p.lows}
    notes = {"mark": mark, "packed": json.dumps({name: (p.bits, p.outputs) for name, p in packed.items()})}
    write_atomic(path, safetensors.torch.save(tensors, notes))
    return PackedLlama(config, parts)


class PackedLlama:
    """The same function as llama.Llama, for reading along: tokens of any sequences at any positions in one pass."""

    def __init__(self, config: LlamaConfig, parts: dict):
        self.adapters: dict[str, Adapter] = {}
        """By the name that a row asks for."""
        if reason := kernels.unavailable():
            raise UserError(f"packed weights need compiled kernels: {reason}")
        self.config = config
        self.parts = parts
        self.blocks = [
            {name.split(".")[2]: p for name, p in parts.items() if name.startswith(f"blocks.{i}.")}
            for i in range(config.depth)
        ]
        self.turned = [int(i not in config.no_rope_layers) for i in range(config.depth)]
        self.windows = list(config.sliding_windows or [0] * config.depth)
        self.bits = [b[stack].bits for b in self.blocks for stack in STACKS]
        self.flat = [t for b in self.blocks for t in tensors_of(b)]
        self.cos, self.sin = rope_table(config.context, config.head_width, config.rope_base, config.rope_scaling)

    def bytes(self) -> int:
        """Of all packed weights: what a step reads."""
        packed = [p for p in self.parts.values() if isinstance(p, Packed)]
        return sum(t.nbytes for p in packed for t in (p.codes, p.scales, p.lows))

    def products(self) -> int:
        """Multiplications a token, the head included."""
        packed = {name: p for name, p in self.parts.items() if isinstance(p, Packed)}
        if not self.config.tied_embeddings:
            del packed["embedding"]
        return sum(p.outputs * p.codes.size(1) * GROUP for p in packed.values())

    def new_pages(self, count: int) -> torch.Tensor:
        """(layers, pages, J, 2, 16 x head width) fp16: 16 tokens a page, keys as (head width, 16), values as (16, head width)."""
        c = self.config
        return torch.empty(c.depth, count, c.key_value_heads, 2, LANES * c.head_width, dtype=torch.float16)

    def forward(self, tokens_N, rows_N, positions_N, pages, table, wanted, adapted=()) -> torch.Tensor:
        """Logits (wanted, V) in fp32 after the tokens numbered `wanted`.

        Token n of sequence rows_N[n] stands at positions_N[n]; that sequence's pages are listed in table[rows_N[n]].
        `adapted` pairs a slice of the tokens with the adapter that they go through.
        """
        c, ops, N, shapes = self.config, torch.ops.nanoghost, len(tokens_N), self.config.matrix_shapes()
        x_ND = unpack(self.parts["embedding"], tokens_N)
        width = (c.heads + 2 * c.key_value_heads) * c.head_width

        def linear(x, p: Packed, out, bias=NONE, norm=NONE, add=False):
            ops.linear.default(x, p.codes, p.scales, p.lows, p.bits, bias, norm, c.norm_eps, out, add)
            return out

        def correct(y, layer, stack, x, norm=None):
            """Add the adapters' part of the matrices of a stack, whose outputs stand side by side in y."""
            for tokens, adapter in adapted:
                pairs = [adapter.updates.get((layer, name)) for name in STACKS[stack]]
                if any(pairs):
                    h = x[tokens]
                    if norm is not None:
                        h = F.rms_norm(h, (c.width,), norm, c.norm_eps)
                    elif stack == "down":
                        h = F.silu(h[:, : c.mlp_width]) * h[:, c.mlp_width :]
                for pair, part in zip(pairs, y[tokens].split([shapes[name][0] for name in STACKS[stack]], 1)):
                    if pair:
                        a_RM, b_NR, scale = pair
                        part.addmm_(h @ a_RM.T, b_NR.T, alpha=scale)

        where, scale = (table, rows_N, positions_N), c.head_width**-0.5
        if not adapted:
            ops.layers.default(
                x_ND, self.flat, self.bits, self.turned, self.windows, self.cos, self.sin, pages, *where, scale, c.norm_eps
            )  # fmt: skip
        for layer, (b, cache) in enumerate(zip(self.blocks, pages)) if adapted else ():
            turned = (self.cos, self.sin) if self.turned[layer] else (NONE, NONE)
            norms = (b.get("q_norm", NONE), b.get("k_norm", NONE), c.norm_eps)
            qkv = linear(x_ND, b["qkv"], torch.empty(N, width), b.get("qkv_bias", NONE), b["attention_norm"])
            correct(qkv, layer, "qkv", x_ND, b["attention_norm"])
            y = ops.attend.default(qkv, *turned, cache, *where, scale, self.windows[layer], *norms)
            linear(y, b["out"], x_ND, b.get("out_bias", NONE), add=True)
            correct(x_ND, layer, "out", y)
            gate_up = linear(x_ND, b["gate_up"], torch.empty(N, 2 * c.mlp_width), norm=b["mlp_norm"])
            correct(gate_up, layer, "gate_up", x_ND, b["mlp_norm"])
            linear(gate_up, b["down"], x_ND, add=True)
            correct(x_ND, layer, "down", gate_up)
        x_ND = x_ND[wanted]
        head = self.parts["embedding" if c.tied_embeddings else "head"]
        return linear(x_ND, head, torch.empty(len(x_ND), c.vocab_size), norm=self.parts["final_norm"])

    def logprobs(self, tokens_BT, targets_BT) -> torch.Tensor:
        """log P(target | tokens so far), (B, T) in fp32, as llama.Llama.logprobs; one row after the other."""
        T = tokens_BT.size(1)
        pages = self.new_pages(-(-T // LANES))
        rows_T, positions_T = torch.zeros(T, dtype=torch.int32), torch.arange(T, dtype=torch.int32)
        table, wanted = torch.arange(pages.size(1), dtype=torch.int32)[None], torch.arange(T)
        found = []
        for tokens_T, targets_T in zip(tokens_BT, targets_BT):
            logits_TV = self.forward(tokens_T, rows_T, positions_T, pages, table, wanted)
            found.append(-F.cross_entropy(logits_TV, targets_T, reduction="none"))
        return torch.stack(found)
