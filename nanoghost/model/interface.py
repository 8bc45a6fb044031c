"""What training, evaluation and the engine expect of a model. Both families (ghost.py, llama.py) provide it.

B rows, T new tokens of each, V vocabulary, D width, N predicted tokens.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from nanoghost.model.kv_cache import KVCache
from nanoghost.model.layout import Layout
from nanoghost.model.lora import Adapter


class ModelConfig(Protocol):
    """Configuration of a model: a frozen dataclass such as GhostConfig or LlamaConfig."""

    vocab_size: int
    context: int
    """Length of the longest sequence, in tokens."""
    depth: int
    """Number of layers."""
    width: int
    """D: width of the residual stream."""
    model_type: str
    """Architecture, as in config.json."""

    @classmethod
    def for_depth(cls, depth: int, vocab_size: int, context: int) -> "ModelConfig":
        """The configuration of a new model of this depth (`nanoghost pretrain --depth`)."""

    @classmethod
    def from_json(cls, values: dict) -> "ModelConfig":
        """From the content of config.json, which holds more than the architecture."""

    def to_json(self) -> dict:
        """The content of config.json, except for `architectures`."""


class LanguageModel(Protocol):
    config: ModelConfig
    blocks: nn.ModuleList
    """The layers."""
    adapters: Sequence[Adapter]
    """LoRA adapters in use. A ghost has none."""

    @property
    def head_weight(self) -> torch.Tensor:
        """Weight (V, D) of the output layer; the embedding's if they are tied."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: that of matmuls and of the cache."""

    @property
    def device(self) -> torch.device: ...

    def __call__(
        self,
        tokens_BT: torch.Tensor,
        cache: KVCache | None = None,
        segments_BT: torch.Tensor | None = None,
        last_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores (B, T, V) in fp32 whose softmax is P(next token): logits of a Llama, log-probabilities of a ghost.

        `cache` holds what the rows have read before; `tokens_BT` are added to it. `segments_BT` (without a cache): if
        rows hold several conversations, the number of each token's conversation; nothing passes from one to another.
        `last_B`: return only the scores after this token of each row, (B, 1, V).
        """

    def logprobs(
        self,
        tokens_BT: torch.Tensor,
        targets: torch.Tensor,
        segments_BT: torch.Tensor | None = None,
        layout: Layout | None = None,
        logit_positions: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """log P(target | tokens so far) in fp32, in the shape of `targets`: (B, T), or (N,) with `logit_positions`.

        `logit_positions`: (row, position) indices, (N,) each, that predict the targets. `layout` replaces `segments_BT`
        if rows are not simply texts from left to right.
        """

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for this many rows of up to `capacity` tokens, at most the model's context."""

    def set_character_features(self, tokenizer) -> None:
        """Tell a new model which characters each token consists of. Ghost only; a Llama ignores it."""

    def set_embedding_row_dropout(self, epochs: float, seed: int) -> None:
        """Regularize the embedding tables for a text that is read `epochs` times. Ghost only; a Llama ignores it."""

    def cast(self, dtype: torch.dtype) -> "LanguageModel":
        """Cast the weights of matmuls to this dtype, in place."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters to train, by the name of the optimizer settings that they share (train/hyperparameters.py)."""

    def stacked_matrices(self) -> dict[nn.Parameter, int]:
        """Parameters that hold several matrices of one shape, stacked along dimension 0, and their number. Muon updates
        each of them as a matrix of its own."""

    def parameter_counts(self) -> dict[str, int]:
        """Number of weights of each parameter group, without LoRA adapters."""

    def flops_per_token(self, context: int | None = None) -> int:
        """Useful FLOPs of a training step for each token, in rows of `context` tokens (default: the model's)."""

    def exported_tensors(self) -> dict[str, torch.Tensor]:
        """The content of model.safetensors; for the Llama family with Hugging Face's names."""

    def import_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load the content of a model.safetensors."""
