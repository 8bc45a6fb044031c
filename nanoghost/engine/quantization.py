"""Quantized matrices: weights in 4, 8 or 16 bits, in the order in which the kernels read them.

  bits  a weight is                                                          the kernels round the input to
  4     one of 16 levels from the lowest to the highest of its group (Q4_1)  8 bits and a scale for each group
  8     a signed integer times the scale of its group (Q8_0)                 the same
  16    bf16                                                                 bf16

A group is GROUP neighboring inputs of one output, as in GGUF's blocks of the types in parentheses. A tile is LANES
outputs, which the kernels compute side by side.

M outputs, K inputs, G groups, N selected outputs.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

GROUP, LANES = 32, 16  # as in lanes.h
TINY = 1e-30  # keeps the scale of a group of zeros from dividing by 0


@dataclass(frozen=True)
class QuantizedMatrix:
    codes: torch.Tensor
    """(tiles, G, 64 x bits) bytes: 4 neighboring inputs of output 0, of output 1, ... (16 bits: 2 inputs). With 4 bits
    a byte holds an input of the first half of the group, and in its high bits one of the second half."""
    scales: torch.Tensor
    """(tiles, G, LANES) fp16; empty with 16 bits."""
    mins: torch.Tensor
    """(tiles, G, LANES) fp16: the lowest weight of each group; only with 4 bits."""
    bits: int
    outputs: int
    """M; the last tile can have fewer than LANES."""

    @property
    def num_weights(self) -> int:
        return self.outputs * self.codes.size(1) * GROUP

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.mins.nbytes


def quantize(weight_MK: torch.Tensor, bits: int) -> QuantizedMatrix:
    """Quantize a matrix to 4, 8 or 16 bits. K must be a multiple of GROUP."""
    M, K = weight_MK.shape
    tiles, G = math.ceil(M / LANES), K // GROUP
    w = F.pad(weight_MK.float(), (0, 0, 0, tiles * LANES - M)).view(tiles, LANES, G, GROUP)
    scales = mins = torch.empty(0, dtype=torch.float16)
    if bits == 16:
        codes = w.view(tiles, LANES, G, GROUP // 2, 2).permute(0, 2, 3, 1, 4).bfloat16().contiguous()
        return QuantizedMatrix(codes.view(torch.uint8).view(tiles, G, -1), scales, mins, bits, M)
    if bits == 8:
        scale = (w.abs().amax(-1) / 127).half()
        codes = (w / scale.float().clamp_min(TINY)[..., None]).round_().clamp_(-127, 127).add_(128)
    else:
        low, high = w.amin(-1), w.amax(-1)
        scale, low = ((high - low) / 15).half(), low.half()
        codes = ((w - low.float()[..., None]) / scale.float().clamp_min(TINY)[..., None]).round_().clamp_(0, 15)
        mins = low.permute(0, 2, 1).contiguous()
    scales = scale.permute(0, 2, 1).contiguous()
    codes = codes.to(torch.uint8).view(tiles, LANES, G, 8, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        codes = codes[:, :, :4] | codes[:, :, 4:] << 4
    return QuantizedMatrix(codes.reshape(tiles, G, -1), scales, mins, bits, M)


def dequantize(q: QuantizedMatrix, outputs_N: torch.Tensor | None = None) -> torch.Tensor:
    """The weights in fp32, (M, K); or (N, K), only those of some outputs."""
    outputs_N = torch.arange(q.outputs) if outputs_N is None else outputs_N
    tile, lane = outputs_N // LANES, outputs_N % LANES
    tiles, G, _ = q.codes.shape
    if q.bits == 16:
        codes = q.codes.view(torch.bfloat16).view(tiles, G, GROUP // 2, LANES, 2)
        return codes[tile, :, :, lane].flatten(1).float()
    codes = q.codes.view(tiles, G, -1, LANES, 4)[tile, :, :, lane]  # (N, G, 8, 4); 4 bits: (N, G, 4, 4)
    scales = q.scales[tile, :, lane].float()[..., None]
    if q.bits == 8:
        return ((codes.flatten(2).float() - 128) * scales).flatten(1)
    codes = torch.cat([codes & 15, codes >> 4], 2).flatten(2).float()
    return (codes * scales + q.mins[tile, :, lane].float()[..., None]).flatten(1)


def auto_bits(weight_MK: torch.Tensor) -> int:
    """4 if that is lossless, because the weights come from a file with 4 bits; otherwise 8. Judged by LANES outputs."""
    sample = weight_MK[:LANES]
    restored = dequantize(quantize(sample, 4))
    return 4 if torch.allclose(restored, sample.float(), rtol=1e-5, atol=1e-7) else 8
