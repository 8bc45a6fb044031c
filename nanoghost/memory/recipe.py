"""How an adapter is trained: one recipe for nights, and one, derived from it, for the fact extractor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterRecipe:
    rank: int = 8
    """LoRA rank."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    context: int = 256
    """Tokens in a step, without the prefix that all examples share."""
    teacher_weight: float = 0.5
    """Weight of the teacher's probabilities in the targets of facts; the rest is the answer's own tokens."""
    answer_tokens: int = 32
    """Maximum length of a teacher's answer about a fact."""
    general_tokens: int = 24
    """Maximum length of the base model's answers to general prompts, which the adapter must not change."""
    general_weight: float = 1.5
    """Weight in the loss of a token of these answers; a token of an answer about a fact has weight 1."""
    seed: int = 0
    """Random seed."""
