"""The key-value cache of the PyTorch models: one row per sequence, one slot per token.

B rows in the forward pass, T new tokens of each, S slots in use, H key-value heads, K head width.
"""

import torch

from nanoghost.model.layout import Layout, additive_mask


class KVCache:
    """Keys and values (layers, rows, H, capacity, K) and the tokens that they belong to; token n of a row is in slot n.

    `select` chooses the rows of the next forward pass and where each continues; without it all rows go on. If a row has
    fewer new tokens than T, the padding on its right fills slots that the row has not reached. They are masked, and
    overwritten later. One slot more than the capacity takes padding beyond the end.
    """

    rows: slice | torch.Tensor
    """Rows of the forward pass: the first B, or their indices (B,)."""
    next_slots_B: torch.Tensor
    """Slot of the next token of each of these rows."""
    written: tuple[torch.Tensor, torch.Tensor]
    """Row (B, 1) and slot (B, T) of the tokens of the current forward pass."""
    num_slots: int
    """S of the current forward pass: slots up to the last one written."""

    def __init__(self, layers: int, rows: int, capacity: int, heads: int, head_width: int, dtype, device="cpu"):
        self.capacity = capacity
        self.keys = torch.zeros(layers, rows, heads, capacity + 1, head_width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.tokens = torch.zeros(rows, capacity + 1, dtype=torch.long, device=device)
        self.select(None, torch.zeros(rows, dtype=torch.long, device=device))

    def select(self, rows: list[int] | None, next_slots_B: torch.Tensor) -> None:
        """Rows of the next forward pass (None: the first B) and the slot from which each of them continues."""
        self.rows = slice(0, len(next_slots_B)) if rows is None else torch.tensor(rows, device=self.keys.device)
        self.next_slots_B = next_slots_B

    def append_tokens(self, tokens_BT, dtype) -> Layout:
        """Begin a forward pass: store its tokens and return their layout."""
        B, T = tokens_BT.shape
        device = tokens_BT.device
        slots_BT = (self.next_slots_B[:, None] + torch.arange(T, device=device)).clamp_max_(self.capacity)
        self.next_slots_B = self.next_slots_B + T
        self.num_slots = int(slots_BT.max()) + 1
        rows_B = torch.arange(B, device=device) if isinstance(self.rows, slice) else self.rows
        self.written = rows_B[:, None], slots_BT
        self.tokens[self.written] = tokens_BT
        slots_S = torch.arange(self.num_slots, device=device)
        return Layout(
            prev_index_BS=(slots_S - 1).expand(B, -1),
            positions_BT=slots_BT.clamp_max(self.capacity - 1),
            slots_BT=slots_BT,
            mask_BTS=additive_mask(slots_S <= slots_BT[..., None], dtype),
        )

    @property
    def tokens_BS(self) -> torch.Tensor:
        """All tokens of the rows of the current forward pass; undefined behind the newest token of a row."""
        return self.tokens[self.rows, : self.num_slots]

    def append(self, layer: int, k_BTHK, v_BTHK):
        """Store keys and values of the new tokens in one layer; returns those of all slots, (B, S, H, K) each."""
        rows_B1, slots_BT = self.written
        self.keys[layer][rows_B1, :, slots_BT] = k_BTHK
        self.values[layer][rows_B1, :, slots_BT] = v_BTHK
        k_BHSK = self.keys[layer, self.rows, :, : self.num_slots]
        v_BHSK = self.values[layer, self.rows, :, : self.num_slots]
        return k_BHSK.transpose(1, 2), v_BHSK.transpose(1, 2)

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` tokens of each source row to its target row."""
        if not sources:
            return
        self.keys[:, targets, :, :length] = self.keys[:, sources, :, :length]
        self.values[:, targets, :, :length] = self.values[:, sources, :, :length]
        self.tokens[targets, :length] = self.tokens[sources, :length]
