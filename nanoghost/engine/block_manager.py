"""Blocks of the KV cache: which sequence uses which, and which prefixes of earlier sequences are cached.

The cache is divided into blocks of BLOCK_SIZE tokens. A sequence has a list of blocks, its row of the block table. A
full block is identified by its tokens and by the block before it (the first one by adapter and owner), so a chain of
blocks identifies a prefix exactly. A sequence with the same prefix shares these blocks: the next turn of a
conversation, or another conversation with the same system prompt. Blocks that no sequence uses stay cached until their
memory is needed; the least recently used go first.
"""

import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import count

import torch

from nanoghost.engine.quantized_llama import LANES
from nanoghost.engine.sequence import Sequence

BLOCK_SIZE = LANES  # tokens in a block: the kernels compute attention scores of one block at a time


@dataclass
class Allocation:
    """The slot and the blocks of one running sequence."""

    slot: int
    """Row of the block table."""
    blocks: list[int]
    num_registered: int
    """How many of its first blocks are in the prefix cache."""


class BlockManager:
    def __init__(self, num_blocks: int, num_slots: int, max_len: int):
        """`max_len`: maximum number of tokens of one sequence."""
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """Blocks that no sequence uses, the least recently used first."""
        self.ref_count = [0] * num_blocks
        self.hash_to_block: dict[tuple, int] = {}
        """Key of a full block -> block. The key is (prefix id of the block before, tokens) itself and not a hash of it:
        hashes can collide, and a client could then read another client's text."""
        self.block_key: list[tuple[tuple, int] | None] = [None] * num_blocks
        """(key, prefix id) of each full block. No prefix id is used twice, so no key refers to an evicted block."""
        self.next_prefix_id = count(1)
        self.block_table = torch.zeros(num_slots, math.ceil(max_len / BLOCK_SIZE), dtype=torch.int32)
        self.free_slots = deque(range(num_slots))
        self.allocations: dict[int, Allocation] = {}
        """By id() of the sequence."""

    def allocate(self, sequence: Sequence) -> bool:
        """Give a sequence a slot and blocks for `max_len` tokens, as many as possible from the prefix cache.

        Sets `num_computed` to the length of the cached prefix. False if there is no slot, or not enough free blocks.
        """
        cached = self.cached_prefix(sequence)
        if not self.allocate_with_prefix(sequence, cached):
            return False
        sequence.num_computed = len(cached) * BLOCK_SIZE
        return True

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks with the beginning of a prompt; its last token is not among them, because its logits are needed."""
        prefix_id = (sequence.adapter, sequence.owner)
        blocks = []
        for start in range(0, len(sequence.prompt_ids) - BLOCK_SIZE, BLOCK_SIZE):
            key = (prefix_id, tuple(sequence.pending_ids[start : start + BLOCK_SIZE]))
            block = self.hash_to_block.get(key)
            if block is None:
                break
            blocks.append(block)
            _, prefix_id = self.block_key[block]
        return blocks

    def allocate_with_prefix(self, sequence: Sequence, prefix_blocks: list[int]) -> bool:
        """Allocate a slot, these cached blocks, and new blocks for the rest; False if there are not enough."""
        num_new = math.ceil(sequence.max_len / BLOCK_SIZE) - len(prefix_blocks)
        num_free_prefix = sum(block in self.free_blocks for block in prefix_blocks)
        if not self.free_slots or num_new > len(self.free_blocks) - num_free_prefix:
            return False
        for block in prefix_blocks:
            self.add_ref(block)
        blocks = prefix_blocks + [self.evict_lru() for _ in range(num_new)]
        slot = self.free_slots.popleft()
        self.allocations[id(sequence)] = Allocation(slot, blocks, len(prefix_blocks))
        self.block_table[slot, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        return True

    def evict_lru(self) -> int:
        """Take the least recently used free block, and remove it from the prefix cache."""
        block, _ = self.free_blocks.popitem(last=False)
        self.ref_count[block] = 1
        if self.block_key[block]:
            key, _ = self.block_key[block]
            del self.hash_to_block[key]
            self.block_key[block] = None
        return block

    def fork(self, sequence: Sequence, sibling: Sequence) -> bool:
        """Allocate a sibling that shares the full blocks of a sequence; False if there is no room.

        If the sequence has a partly filled block, the caller copies it: the two continue it differently.
        """
        self.register_full_blocks(sequence)
        num_full = sequence.num_computed // BLOCK_SIZE
        return self.allocate_with_prefix(sibling, self.blocks_of(sequence)[:num_full])

    def register_full_blocks(self, sequence: Sequence) -> None:
        """Enter the blocks that a sequence has filled into the prefix cache."""
        allocation = self.allocations[id(sequence)]
        num_full = sequence.num_computed // BLOCK_SIZE
        if num_full <= allocation.num_registered:
            return
        token_ids = sequence.token_ids
        for i in range(allocation.num_registered, num_full):
            prefix_id = (sequence.adapter, sequence.owner)
            if i:
                _, prefix_id = self.block_key[allocation.blocks[i - 1]]
            key = (prefix_id, tuple(token_ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]))
            block = self.hash_to_block.get(key)
            if block is None:
                block = allocation.blocks[i]
                self.hash_to_block[key] = block
                self.block_key[block] = (key, next(self.next_prefix_id))
            else:  # meanwhile another sequence filled a block with the same tokens: share that one
                self.add_ref(block)
                self.remove_ref(allocation.blocks[i])
                allocation.blocks[i] = block
                self.block_table[allocation.slot, i] = block
        allocation.num_registered = num_full

    def free(self, sequence: Sequence) -> None:
        """Return the slot and the blocks of a sequence. Its full blocks stay in the prefix cache."""
        self.register_full_blocks(sequence)
        allocation = self.allocations.pop(id(sequence))
        for block in reversed(allocation.blocks):  # the end of a text is reused less often than its beginning
            self.remove_ref(block)
        self.free_slots.append(allocation.slot)

    def add_ref(self, block: int) -> None:
        self.ref_count[block] += 1
        self.free_blocks.pop(block, None)

    def remove_ref(self, block: int) -> None:
        self.ref_count[block] -= 1
        if not self.ref_count[block]:
            self.free_blocks[block] = None

    def slot_of(self, sequence: Sequence) -> int:
        return self.allocations[id(sequence)].slot

    def blocks_of(self, sequence: Sequence) -> list[int]:
        return self.allocations[id(sequence)].blocks
