"""The key-value cache of the PyTorch models: one row per sequence, one column per token.

B rows in the forward pass, T new tokens of each, S tokens of each in the cache, G key-value heads, K head width.
"""

import torch

from nanoghost.model.layout import Layout, additive_mask


class KVCache:
    """Keys and values (layers, rows, G, capacity, K) and the tokens that they belong to; token n of a row has index n.

    `select` chooses the rows of the next forward pass and where each continues; without it all rows continue. If a row
    has fewer new tokens than T, the padding on its right is stored at indices that the row has not reached. These are
    masked, and overwritten later. One index more than the capacity takes padding beyond the end.
    """

    rows: slice | torch.Tensor
    """Rows of the forward pass: the first B, or their indices (B,)."""
    next_index_B: torch.Tensor
    """Index of the next token of each of these rows."""
    write_index: tuple[torch.Tensor, torch.Tensor]
    """Row (B, 1) and index in it (B, T) of the tokens of the current forward pass: where the pass writes."""
    num_cached: int
    """S of the current forward pass: tokens up to the last one written."""

    def __init__(self, layers: int, rows: int, capacity: int, heads: int, head_width: int, dtype, device="cpu"):
        self.capacity = capacity
        self.keys = torch.zeros(layers, rows, heads, capacity + 1, head_width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.tokens = torch.zeros(rows, capacity + 1, dtype=torch.long, device=device)
        self.select(None, torch.zeros(rows, dtype=torch.long, device=device))

    def select(self, rows: list[int] | None, next_index_B: torch.Tensor) -> None:
        """Rows of the next forward pass (None: the first B) and the index from which each of them continues."""
        self.rows = slice(0, len(next_index_B)) if rows is None else torch.tensor(rows, device=self.keys.device)
        self.next_index_B = next_index_B

    def append_tokens(self, tokens_BT, dtype) -> Layout:
        """Begin a forward pass: store its tokens and return their layout."""
        B, T = tokens_BT.shape
        device = tokens_BT.device
        index_BT = (self.next_index_B[:, None] + torch.arange(T, device=device)).clamp_max_(self.capacity)
        self.next_index_B = self.next_index_B + T
        self.num_cached = int(index_BT.max()) + 1
        rows_B = torch.arange(B, device=device) if isinstance(self.rows, slice) else self.rows
        self.write_index = rows_B[:, None], index_BT
        self.tokens[self.write_index] = tokens_BT
        index_S = torch.arange(self.num_cached, device=device)
        return Layout(
            prev_index_BS=(index_S - 1).expand(B, -1),
            positions_BT=index_BT.clamp_max(self.capacity - 1),
            index_BT=index_BT,
            mask_BTS=additive_mask(index_S <= index_BT[..., None], dtype),
        )

    @property
    def tokens_BS(self) -> torch.Tensor:
        """All tokens of the rows of the current forward pass; undefined after the newest token of a row."""
        return self.tokens[self.rows, : self.num_cached]

    def append(self, layer: int, k_BTGK, v_BTGK):
        """Store keys and values of the new tokens in one layer; returns those of all S tokens, (B, S, G, K) each."""
        rows_B1, index_BT = self.write_index
        self.keys[layer][rows_B1, :, index_BT] = k_BTGK
        self.values[layer][rows_B1, :, index_BT] = v_BTGK
        k_BGSK = self.keys[layer, self.rows, :, : self.num_cached]
        v_BGSK = self.values[layer, self.rows, :, : self.num_cached]
        return k_BGSK.transpose(1, 2), v_BGSK.transpose(1, 2)

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` tokens of each source row to its target row."""
        if not sources:
            return
        self.keys[:, targets, :, :length] = self.keys[:, sources, :, :length]
        self.values[:, targets, :, :length] = self.values[:, sources, :, :length]
        self.tokens[targets, :length] = self.tokens[sources, :length]
