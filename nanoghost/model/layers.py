"""The few operations that every model here is made of, written so that eager PyTorch on a CPU runs them fast.

B batch, T time, S time in the cache plus T, D width, H heads, K head width, V vocabulary, N = B * T positions.

On two cores an eager step at width 256 spends as long in elementwise operations as in matrix products, each of them a
pass over memory. So normalisation, rotation and ReLU-squared have hand-written backward passes that touch memory less
often than autograd's; tests hold them to finite differences.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK = 1024  # positions whose logits are in flight at once: 1024 x 4096 bf16 stays in the last-level cache


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD):
        size = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(size.square() / x_BTD.size(-1) + 1e-6).to(x_BTD.dtype)
        y_BTD = x_BTD * scale
        ctx.save_for_backward(y_BTD, scale)
        return y_BTD

    @staticmethod
    def backward(ctx, grad_BTD):
        y_BTD, scale = ctx.saved_tensors
        along = (grad_BTD * y_BTD).mean(-1, keepdim=True)
        return torch.addcmul(grad_BTD, y_BTD, along, value=-1).mul_(scale)


def norm(x_BTD):
    """RMSNorm without parameters over the last dimension (Zhang and Sennrich 2019)."""
    return _RMSNorm.apply(x_BTD)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        r = torch.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx, grad):
        (r,) = ctx.saved_tensors
        return torch.mul(r, grad).mul_(2)


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
    (a, b), (ya, yb) = x.chunk(2, -1), y.chunk(2, -1)
    torch.mul(a, cos, out=ya).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=yb).addcmul_(a, sin)
    return y


def rotate(x_BTHK, cos_TK, sin_TK):
    """Rotary position embedding (Su et al. 2021), halves paired as in the Llama family.

    Tables are (T, K/2), or (B, T, K/2) where rows have positions of their own.
    """
    shape = cos_TK.shape[:-1] + (1,) * (x_BTHK.dim() - 3) + (-1,)
    return _Rotate.apply(x_BTHK, cos_TK.to(x_BTHK.dtype).view(shape), sin_TK.to(x_BTHK.dtype).view(shape))


@dataclass
class Layout:
    """How the tokens of a batch stand to each other."""

    before_BS: torch.Tensor
    """Where in its row the token before each stands, of all that were read so far; -1 where there is none."""
    positions_BT: torch.Tensor
    """For the rotary embedding; (T,) if they are the same in all rows."""
    columns_BT: torch.Tensor
    """Where in its row each new token stands."""
    mask_BTS: torch.Tensor
    """-inf where a token (T) may not see another (S), else 0; B is 1 if all rows are alike."""

    def previous(self, tokens_BS):
        """The token before each new one, (B, T); 0 where there is none."""
        before_BT = self.before_BS.gather(1, self.columns_BT)
        return tokens_BS.gather(1, before_BT.clamp(0)) * (before_BT >= 0)

    def within(self, window: int):
        """The mask of a layer in which a token sees only the last `window` tokens, itself included."""
        at_BT = self.positions_BT.view(-1, self.positions_BT.size(-1))
        S = self.mask_BTS.size(2)
        # positions of what was read before are column numbers (Cache); of one pass, those of its own tokens
        at_BS = at_BT if at_BT.size(1) == S else torch.arange(S, device=at_BT.device)[None]
        far_BTS = at_BT[:, :, None] - at_BS[:, None] >= window
        return self.mask_BTS.masked_fill(far_BTS, float("-inf"))


def text_layout(tokens_BT, dtype, segments_BT=None) -> Layout:
    """Texts from left to right; nothing passes between tokens with different numbers in `segments_BT`."""
    B, T = tokens_BT.shape
    positions = torch.arange(T, device=tokens_BT.device)
    before_BS = (positions - 1).repeat(B, 1)
    if segments_BT is not None:
        before_BS[:, 1:].masked_fill_(segments_BT[:, 1:] != segments_BT[:, :-1], -1)
    return Layout(before_BS, positions, positions.expand(B, T), causal_mask(T, dtype, tokens_BT.device, segments_BT))


def shared_prompts(prompts: list[list[int]], attempts: list[list[list[int]]], dtype, device):
    """Rows that hold a prompt once and all attempts at it behind, each blind to the others: (tokens, Layout, places).

    The last token of an attempt is only predicted, never read. `places`, a pair of (N,) indices, tells for every token
    of every attempt in order the row and the position it is predicted from.
    """
    lengths = [len(p) + sum(len(a) - 1 for a in group) for p, group in zip(prompts, attempts)]
    B, T = len(prompts), max(lengths)
    tokens, positions = (torch.zeros(B, T, dtype=torch.long) for _ in range(2))
    before = torch.arange(-1, T - 1).repeat(B, 1)
    segments = torch.full((B, T), -1)  # 0: prompt, 1 and up: attempts, -1: padding
    places = []
    for b, (prompt, group) in enumerate(zip(prompts, attempts)):
        at = 0
        for segment, ids in enumerate([prompt, *(a[:-1] for a in group)]):
            end, first = at + len(ids), len(prompt) if segment else 0
            tokens[b, at:end] = torch.tensor(ids)
            positions[b, at:end] = torch.arange(first, first + len(ids))
            segments[b, at:end] = segment
            if segment:
                before[b, at : at + 1] = len(prompt) - 1
                places += [(b, len(prompt) - 1)] + [(b, j) for j in range(at, end)]
            at = end
    seen, looking = segments[:, None, :], segments[:, :, None]
    visible = torch.ones(T, T, dtype=torch.bool).tril() & ((seen == looking) | (seen == 0))
    columns = torch.arange(T).expand(B, T)
    layout = Layout(before.to(device), positions.to(device), columns.to(device), additive(visible, dtype).to(device))
    return tokens.to(device), layout, tuple(torch.tensor(places, device=device).unbind(1))


def additive(visible_BTS, dtype):
    """A mask to add to scores: 0 where visible, -inf elsewhere."""
    zeros = torch.zeros(visible_BTS.shape, dtype=dtype, device=visible_BTS.device)
    return zeros.masked_fill_(~visible_BTS, float("-inf"))


def causal_mask(length: int, dtype, device, segments_BT=None):
    """What attention may not see, as -inf: (1, T, T), or (B, T, T) if rows hold several conversations (segments)."""
    visible = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
    if segments_BT is not None:
        visible = visible & (segments_BT[:, :, None] == segments_BT[:, None, :])
    return additive(visible, dtype)


def attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, scale: float):
    """Softmax attention; the mask is added to the scores. Returns (B, T, H * K).

    Each of G heads of keys and values serves H / G query heads, whose queries stand one below the other in one product.
    Plain batched products: at T = 256 they run twice as fast, forward and backward, as the fused CPU kernel (which
    wins only when T x T scores no longer fit in cache). On a GPU the fused kernel is used.
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
        for h, probs in zip(hidden_ND.split(CHUNK), probs_NV.split(CHUNK)):
            torch.mm(h, head_VD.T, out=probs)
            torch.softmax(probs, 1, out=probs)
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, probs_NV)
        return probs_NV.gather(1, targets_N[:, None])[:, 0].float().clamp_min_(1e-30).log_()

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, head_VD, targets_N, probs_NV = ctx.saved_tensors
        g = grad_N[:, None].to(hidden_ND.dtype)
        # g (onehot - p), where p was: a fresh tensor of this size costs as much as the arithmetic
        grad_logits_NV = probs_NV.mul_(-g).scatter_add_(1, targets_N[:, None], g)
        grad_head_VD = grad_logits_NV.T @ hidden_ND if ctx.needs_input_grad[1] else None
        return grad_logits_NV @ head_VD, grad_head_VD, None


def token_logprobs(hidden_ND, head_VD, targets_N):
    """log P(target) of each position, (N,) fp32, without the fp32 logits of the whole batch ever existing.

    While training, probabilities are kept in the compute dtype (bf16: a relative error of 2^-9, unbiased) for the
    backward pass; without gradients the softmax is fp32.
    """
    if torch.is_grad_enabled():
        return _TokenLogProbs.apply(hidden_ND, head_VD, targets_N)
    chunks = []
    for h, t in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK)):
        chunks.append(-F.cross_entropy((h @ head_VD.T).float(), t, reduction="none"))
    return torch.cat(chunks)


class Cache:
    """Keys and values of what each row has read, (layers, B, H, capacity, K), and the tokens: token n in column n.

    Rows read on from where they stand, each from its own column. Where a row has fewer new tokens than the batch is wide,
    what pads it on the right lands in columns that it has not reached, out of sight until they are overwritten; one column
    more than the capacity takes what would land beyond the end. `pointed` holds what the two pointers of a Ghost compare
    with, the first one's keys a column late, and `spelled` the letters that its second one chooses from.
    """

    def __init__(self, layers, rows, capacity, heads, head_width, dtype, device="cpu", pointer_width=0, places=0):
        self.k = torch.zeros(layers, rows, heads, capacity + 1, head_width, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.pointed = torch.zeros(rows, capacity + 2, 2, pointer_width, dtype=dtype, device=device)
        self.spelled = torch.full((rows, capacity + 1, places), -1, device=device)
        self.tokens = torch.zeros(rows, capacity + 1, dtype=torch.long, device=device)
        self.capacity = capacity
        self.take(None, torch.zeros(rows, dtype=torch.long, device=device))

    def take(self, rows: list[int] | None, starts_B: torch.Tensor) -> None:
        """Who reads next, and from which column on; None for rows 0, 1, ... Without this, all go on where they are."""
        self.rows = slice(0, len(starts_B)) if rows is None else torch.tensor(rows, device=self.k.device)
        self.starts_B = starts_B

    def layout(self, tokens_BT, dtype) -> Layout:
        """Read new tokens."""
        B, T = tokens_BT.shape
        device = tokens_BT.device
        columns_BT = (self.starts_B[:, None] + torch.arange(T, device=device)).clamp_max_(self.capacity)
        self.starts_B = self.starts_B + T
        self.end = int(columns_BT.max()) + 1
        at_B = torch.arange(B, device=device) if isinstance(self.rows, slice) else self.rows
        self.at = at_B[:, None], columns_BT
        self.tokens[self.at] = tokens_BT
        columns = torch.arange(self.end, device=device)
        before_BS = (columns - 1).expand(B, -1)
        positions_BT = columns_BT.clamp_max(self.capacity - 1)
        return Layout(before_BS, positions_BT, columns_BT, additive(columns <= columns_BT[..., None], dtype))

    @property
    def seen(self):
        """All tokens of the rows that read, (B, S); behind a row's own newest token stands anything."""
        return self.tokens[self.rows, : self.end]

    def append(self, layer, k_BTHK, v_BTHK):
        """Store this layer's keys and values of the tokens just read; returns all so far, (B, S, H, K)."""
        rows_B1, columns_BT = self.at
        for whole, new in ((self.k, k_BTHK), (self.v, v_BTHK)):
            whole[layer][rows_B1, :, columns_BT] = new
        return (whole[layer, self.rows, :, : self.end].transpose(1, 2) for whole in (self.k, self.v))

    def point(self, keys_BT2W, spelled_BTP):
        """Store what the pointers need of the tokens just read; returns it for all columns so far."""
        rows_B1, columns_BT = self.at
        self.pointed[rows_B1, columns_BT + 1, 0] = keys_BT2W[:, :, 0]
        self.pointed[rows_B1, columns_BT, 1] = keys_BT2W[:, :, 1]
        self.spelled[self.at] = spelled_BTP
        return self.pointed[self.rows, : self.end], self.spelled[self.rows, : self.end]

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """Let each target row have read what its source has, up to `length` tokens."""
        if sources:
            for whole in (self.k, self.v):
                whole[:, targets, :, :length] = whole[:, sources, :, :length]
            self.pointed[targets, : length + 1] = self.pointed[sources, : length + 1]
            self.spelled[targets, :length] = self.spelled[sources, :length]
            self.tokens[targets, :length] = self.tokens[sources, :length]
