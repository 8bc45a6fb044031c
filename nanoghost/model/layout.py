"""How the tokens of a batch relate to each other: predecessors, positions, and what attention may see.

B batch, T new tokens, S tokens read so far (the new ones included), N predicted tokens.
"""

from dataclasses import dataclass

import torch


@dataclass
class Layout:
    """The relations of the tokens of one forward pass."""

    prev_index_BS: torch.Tensor
    """Index of each token's predecessor in its row; -1 if it has none."""
    positions_BT: torch.Tensor
    """Positions for the rotary embedding; (T,) if they are the same in all rows."""
    index_BT: torch.Tensor
    """Index of each new token among the S tokens of its row; with a cache, its index there."""
    mask_BTS: torch.Tensor
    """Added to attention scores: -inf where a token may not see another, else 0. (1, T, S) if all rows are alike."""

    def previous_tokens(self, tokens_BS):
        """The predecessor of each new token, (B, T); 0 if it has none."""
        prev_index_BT = self.prev_index_BS.gather(1, self.index_BT)
        return tokens_BS.gather(1, prev_index_BT.clamp(0)) * (prev_index_BT >= 0)

    def sliding_window_mask(self, window: int):
        """The mask of a layer in which a token sees only the last `window` tokens, itself included."""
        positions_BT = self.positions_BT.view(-1, self.positions_BT.size(-1))
        S = self.mask_BTS.size(2)
        # Without a cache the S tokens are the T new ones. In a cache positions are indices.
        has_cache = positions_BT.size(1) != S
        positions_BS = torch.arange(S, device=positions_BT.device)[None] if has_cache else positions_BT
        too_far_BTS = positions_BT[:, :, None] - positions_BS[:, None] >= window
        return self.mask_BTS.masked_fill(too_far_BTS, float("-inf"))


def causal_layout(tokens_BT, dtype, segments_BT=None) -> Layout:
    """Layout of rows that are read from left to right. Tokens of different segments do not see each other."""
    B, T = tokens_BT.shape
    positions_T = torch.arange(T, device=tokens_BT.device)
    prev_index_BT = (positions_T - 1).repeat(B, 1)
    if segments_BT is not None:
        is_first_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
        prev_index_BT[:, 1:].masked_fill_(is_first_BT, -1)
    mask_BTT = causal_mask(T, dtype, tokens_BT.device, segments_BT)
    return Layout(prev_index_BT, positions_T, positions_T.expand(B, T), mask_BTT)


PADDING, PROMPT = -1, 0  # segment numbers in shared_prompt_rows; continuations are numbered from 1


def shared_prompt_rows(prompts: list[list[int]], continuations: list[list[list[int]]], dtype, device):
    """Pack each prompt and all its continuations into one row. The continuations do not see each other.

    Returns (tokens_BT, Layout, logit_positions). The last token of a continuation is predicted, but not part of the
    row. `logit_positions` is a pair of (N,) indices: for every token of every continuation, in order, the row and the
    position that predict it.
    """
    lengths = [len(p) + sum(len(c) - 1 for c in group) for p, group in zip(prompts, continuations)]
    B, T = len(prompts), max(lengths)
    tokens, positions = (torch.zeros(B, T, dtype=torch.long) for _ in range(2))
    prev_index = torch.arange(-1, T - 1).repeat(B, 1)
    segments = torch.full((B, T), PADDING)
    logit_positions = []
    for b, (prompt, group) in enumerate(zip(prompts, continuations)):
        start = 0
        for segment, ids in enumerate([prompt, *(continuation[:-1] for continuation in group)]):
            end = start + len(ids)
            first_position = 0 if segment == PROMPT else len(prompt)
            tokens[b, start:end] = torch.tensor(ids)
            positions[b, start:end] = torch.arange(first_position, first_position + len(ids))
            segments[b, start:end] = segment
            if segment != PROMPT:
                prev_index[b, start : start + 1] = len(prompt) - 1
                logit_positions.append((b, len(prompt) - 1))
                logit_positions += [(b, t) for t in range(start, end)]
            start = end
    same_segment = segments[:, None, :] == segments[:, :, None]
    is_prompt = segments[:, None, :] == PROMPT
    visible = torch.ones(T, T, dtype=torch.bool).tril() & (same_segment | is_prompt)
    index = torch.arange(T).expand(B, T)
    layout = Layout(
        prev_index.to(device), positions.to(device), index.to(device), additive_mask(visible, dtype).to(device)
    )
    return tokens.to(device), layout, tuple(torch.tensor(logit_positions, device=device).unbind(1))


def additive_mask(visible_BTS, dtype):
    """A mask to add to attention scores: 0 where visible, -inf elsewhere."""
    zeros = torch.zeros(visible_BTS.shape, dtype=dtype, device=visible_BTS.device)
    return zeros.masked_fill_(~visible_BTS, float("-inf"))


def causal_mask(length: int, dtype, device, segments_BT=None):
    """Additive causal mask: (1, T, T), or (B, T, T) if rows hold several segments."""
    visible = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
    if segments_BT is not None:
        visible = visible & (segments_BT[:, :, None] == segments_BT[:, None, :])
    return additive_mask(visible, dtype)
