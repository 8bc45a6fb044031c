"""The layers and operations of both model families, written so that eager PyTorch on a CPU runs them fast.

On two cores an eager step at width 256 spends as long in elementwise operations as in matmuls, because each of them is
a pass over memory. Therefore normalization, rotary embedding and squared ReLU have hand-written backward passes that
touch memory less often than autograd's. Tests compare them with finite differences.

B batch, T new tokens, S tokens read so far, D width, H heads, G key-value heads, K head width, V vocabulary,
N positions.
"""

import torch
import torch.nn.functional as F
from torch import nn

LOGITS_CHUNK = 1024  # positions whose logits exist at the same time: 1024 x 4096 in bf16 stay in the last-level cache


class Linear(nn.Linear):
    """nn.Linear for mixed precision and reproducible initial weights.

    The bias may stay in fp32 while the weight is in the compute dtype. The constructor draws no random numbers:
    `init_weights` of the model draws all weights, in a fixed order, so that a seed gives the same model whatever
    modules it is made of.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Embedding):
    """nn.Embedding whose constructor draws no random numbers, as with Linear."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight in fp32 (Zhang and Sennrich 2019), as in the Llama family."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def init_uniform(weight: torch.Tensor, variance: float) -> None:
    """Uniform random weights around 0. With a variance of 1 / inputs, outputs are as large as inputs."""
    weight.uniform_(-1, 1).mul_((3 * variance) ** 0.5)


class _UnweightedRMSNorm(torch.autograd.Function):
    """`norm`, with a backward pass that needs only the output and the scale."""

    @staticmethod
    def forward(ctx, x_BTD):
        length = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square() / x_BTD.size(-1) + 1e-6).to(x_BTD.dtype)
        y_BTD = x_BTD * scale
        ctx.save_for_backward(y_BTD, scale)
        return y_BTD

    @staticmethod
    def backward(ctx, grad_BTD):
        y_BTD, scale = ctx.saved_tensors
        projection = (grad_BTD * y_BTD).mean(-1, keepdim=True)
        return torch.addcmul(grad_BTD, y_BTD, projection, value=-1).mul_(scale)


def norm(x_BTD):
    """RMSNorm without parameters over the last dimension (Zhang and Sennrich 2019)."""
    return _UnweightedRMSNorm.apply(x_BTD)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        (positive,) = ctx.saved_tensors
        return torch.mul(positive, grad).mul_(2)


def relu_squared(x):
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    return _ReluSquared.apply(x)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x, cos, sin):
    y = torch.empty_like(x)
    first, second = x.chunk(2, -1)
    first_out, second_out = y.chunk(2, -1)
    torch.mul(first, cos, out=first_out).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=second_out).addcmul_(first, sin)
    return y


def rotate(x_BTHK, cos_TK, sin_TK):
    """Rotary position embedding (Su et al. 2021); channel i is paired with channel i + K/2, as in Hugging Face's Llama.

    cos and sin are (T, K/2), or (B, T, K/2) if positions differ between rows.
    """
    shape = cos_TK.shape[:-1] + (1,) * (x_BTHK.dim() - 3) + (-1,)
    return _Rotate.apply(x_BTHK, cos_TK.to(x_BTHK.dtype).view(shape), sin_TK.to(x_BTHK.dtype).view(shape))


def attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, scale: float):
    """Softmax attention with an additive mask. Returns (B, T, H * K).

    Grouped queries: each of G key-value heads serves H / G query heads, whose queries are stacked into one matmul. On a
    CPU these are plain batched matmuls. At T = 256 they run twice as fast, forward and backward, as PyTorch's fused CPU
    kernel, which wins only when T x T scores no longer fit in the cache (docs/log.md). A GPU uses the fused kernel.
    """
    (B, T, H, K), G = q_BTHK.shape, k_BSGK.size(2)
    if q_BTHK.is_cuda:
        q, k, v = (z.transpose(1, 2) for z in (q_BTHK, k_BSGK, v_BSGK))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BTS[:, None], scale=scale, enable_gqa=True)
        return y.transpose(1, 2).reshape(B, T, H * K)
    q = (q_BTHK * scale).view(B, T, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(B * G, -1, K)
    k, v = (z.transpose(1, 2).reshape(B * G, -1, K) for z in (k_BSGK, v_BSGK))
    mask_BTS = mask_BTS.repeat(1, H // G, 1)
    if mask_BTS.size(0) > 1:
        mask_BTS = mask_BTS.repeat_interleave(G, 0)
    scores = torch.baddbmm(mask_BTS, q, k.mT)
    y = torch.bmm(torch.softmax(scores, -1), v)
    return y.view(B, G, H // G, T, K).permute(0, 3, 1, 2, 4).reshape(B, T, H * K)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N):
        probs_NV = torch.empty(len(hidden_ND), len(head_VD), dtype=hidden_ND.dtype, device=hidden_ND.device)
        for hidden, probs in zip(hidden_ND.split(LOGITS_CHUNK), probs_NV.split(LOGITS_CHUNK)):
            torch.mm(hidden, head_VD.T, out=probs)
            torch.softmax(probs, 1, out=probs)
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, probs_NV)
        return probs_NV.gather(1, targets_N[:, None])[:, 0].float().clamp_min_(1e-30).log_()

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, head_VD, targets_N, probs_NV = ctx.saved_tensors
        grad_N1 = grad_N[:, None].to(hidden_ND.dtype)
        # grad * (onehot - probs), in place: allocating a tensor of this size takes as long as the arithmetic
        grad_logits_NV = probs_NV.mul_(-grad_N1).scatter_add_(1, targets_N[:, None], grad_N1)
        grad_head_VD = grad_logits_NV.T @ hidden_ND if ctx.needs_input_grad[1] else None
        return grad_logits_NV @ head_VD, grad_head_VD, None


def token_logprobs(hidden_ND, head_VD, targets_N):
    """log P(target) at each position, (N,) fp32, without allocating the fp32 logits of the whole batch.

    In training, the probabilities are saved for the backward pass in the compute dtype (bf16: an unbiased relative
    error of 2^-9). Without gradients the softmax is in fp32.
    """
    if torch.is_grad_enabled():
        return _TokenLogProbs.apply(hidden_ND, head_VD, targets_N)
    chunks = []
    for hidden, targets in zip(hidden_ND.split(LOGITS_CHUNK), targets_N.split(LOGITS_CHUNK)):
        logits = (hidden @ head_VD.T).float()
        chunks.append(-F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(chunks)
