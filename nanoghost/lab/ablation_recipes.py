"""The recipes that the ablations compare: from a GPT-2 of 2019 to today's recipe, and alternatives to today's.

A recipe says how to build and train a model (ablation_model.py, ablation_training.py). The defaults are today's recipe.
Parts and alternatives are named here as in the report.
"""

from dataclasses import dataclass, field, replace

from nanoghost import hardware


def fastest_dtype() -> str:
    """Name of the dtype in which this machine multiplies fastest: bfloat16 or float32."""
    return str(hardware.compute_dtype()).removeprefix("torch.")


@dataclass(frozen=True)
class Recipe:
    """A model and its training."""

    dtype: str = field(default_factory=fastest_dtype)
    """Dtype of matmuls, such as "bfloat16"."""
    chunked_loss: bool = True
    """Compute the loss without allocating all logits of a batch; False: PyTorch's cross-entropy of fp32 logits."""
    linear_cooldown: bool = True
    """Constant learning rate, then linear to 0 over the last 60%; False: warmup over 5%, then a cosine to a tenth."""
    rms_norm: bool = True
    """RMSNorm without weights, also on the embedding, and no biases; False: LayerNorm with weights, and biases."""
    rotary: bool = True
    """Rotary position embedding; False: learned positions."""
    qk_norm: bool = True
    """RMSNorm on queries and keys."""
    relu_squared: bool = True
    """Squared ReLU; False: GELU."""
    zero_init: bool = True
    """Matrices that write into the residual stream start at 0, the others uniform with a variance in proportion to
    1 / width; False: normal with a standard deviation of 0.02, or less where they write into the residual stream."""
    learning_rate_by_group: bool = True
    """A learning rate for each of head, embeddings, bigram embedding and scalars, with AdamW's beta1 = 0.8; False: one
    learning rate, with beta1 = 0.9."""
    muon: bool = True
    """Muon for matrices; False: AdamW, with the one learning rate."""
    normuon: bool = True
    """NorMuon's scaling of rows and cautious weight decay; False: plain Muon."""
    muon_iterations: int = 5
    """Iterations of the orthogonalization in Muon."""
    untied_head: bool = True
    """Output layer and embedding are different weights; False: tied."""
    embedding_shortcut: bool = True
    """The embedding is mixed back into the residual stream before each layer."""
    value_embeddings: bool = True
    """Value embeddings in every second layer."""
    bigram_rows: int = 32768
    """Rows of the hashed bigram embedding; 0: none."""
    character_features: bool = True
    """Character features in the embedding."""
    copy_heads: int = 2
    """1: the copy head alone; 2: also the character copy head."""
    vocab_size: int = 4096
    depth: int = 2
    """Number of layers: what the dial chooses for runs as short as these."""
    width: int = 128
    head_width: int = 64
    context: int = 256
    rows: int = 16
    """Rows of `context` tokens in a step."""
    row_ramp: bool = False
    """Half the rows in the first 40% of the steps, 1.5 times as many in the last 30%."""
    context_ramp: bool = False
    """Half the context and twice the rows in the first 40% of the steps."""
    cooldown: float = 0.6
    """Fraction of the run in which the learning rate falls."""
    lr_floor: float = 0.0
    """Final learning rate as a fraction of the peak."""
    initial_momentum: float = 0.95
    """Momentum of Muon at the start; it goes to 0.95 over the first 30%."""
    logit_softcap: float = 0.0
    """Cap c of the logits: x becomes c tanh(x / c); 0: none."""
    table_weight_decay: float = 0.0
    """Weight decay of the embedding tables."""
    second_token_weight: float = 0.0
    """Weight of the loss of a second head, which predicts the token after the next."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which is scored instead of the last weights; 0: none."""


GPT2 = Recipe(
    dtype="float32",
    chunked_loss=False,
    linear_cooldown=False,
    rms_norm=False,
    rotary=False,
    qk_norm=False,
    relu_squared=False,
    zero_init=False,
    learning_rate_by_group=False,
    muon=False,
    normuon=False,
    untied_head=False,
    embedding_shortcut=False,
    value_embeddings=False,
    bigram_rows=0,
    character_features=False,
    copy_heads=0,
)
GPT2_NAME = "2019"
# Each addition is made on top of those before it; all of them together are today's recipe. Those that speed up early
# learning come first.
ADDITIONS = {
    "+ bf16 matmuls": {"dtype": "bfloat16"},  # left out where bfloat16 is slow
    "+ chunked loss": {"chunked_loss": True},
    "+ Muon": {"muon": True},
    "+ zero init": {"zero_init": True},
    "+ untied head": {"untied_head": True},
    "+ learning rates by group": {"learning_rate_by_group": True},
    "+ linear cooldown to 0": {"linear_cooldown": True},
    "+ NorMuon, cautious decay": {"normuon": True},
    "+ RMSNorm, no biases": {"rms_norm": True},
    "+ rotary positions": {"rotary": True},
    "+ QK-norm": {"qk_norm": True},
    "+ ReLU squared": {"relu_squared": True},
    "+ embedding shortcut": {"embedding_shortcut": True},
    "+ value embeddings": {"value_embeddings": True},
    "+ bigram embedding": {"bigram_rows": 32768},
    "+ character features": {"character_features": True},
    "+ copy head": {"copy_heads": 1},
    "+ character copy head": {"copy_heads": 2},
}
# These recipes learn the same as the one after them, "+ chunked loss": they differ only in the time of a step
SPEED_ONLY = (GPT2_NAME, "+ bf16 matmuls")
TOKENS_PER_STEP = Recipe.rows * Recipe.context
ALTERNATIVES = {  # each is one change of today's recipe
    "vocabulary of 2,048": {"vocab_size": 2048},
    "vocabulary of 8,192": {"vocab_size": 8192},
    "1 layer of 192": {"depth": 1, "width": 192},
    "2 layers of 256": {"width": 256},
    "3 layers of 192": {"depth": 3, "width": 192},
    "4 layers of 128": {"depth": 4},
    "one head of 128": {"head_width": 128},
    "8 rows a step": {"rows": 8},
    "32 rows a step": {"rows": 32},
    "growing batch": {"row_ramp": True},
    "short context first": {"context_ramp": True},
    "context of 128, 32 rows": {"context": 128, "rows": 32},
    "cooldown over 100%": {"cooldown": 1.0},
    "cooldown over 40%": {"cooldown": 0.4},
    "cooldown to a tenth": {"lr_floor": 0.1},
    "momentum grows from 0.85": {"initial_momentum": 0.85},
    "3 iterations of Muon": {"muon_iterations": 3},
    "softcap of 15": {"logit_softcap": 15.0},
    "decay on tables": {"table_weight_decay": 0.1},
    "65,536 bigrams": {"bigram_rows": 65536},
    "second token": {"second_token_weight": 0.3},
    "average of the weights": {"ema_decay": 0.9},
}


def supported_additions() -> dict[str, dict]:
    """ADDITIONS, without those to a dtype that is slow on this machine."""
    dtype = fastest_dtype()
    return {name: change for name, change in ADDITIONS.items() if change.get("dtype", dtype) == dtype}


def cumulative() -> dict[str, Recipe]:
    """GPT-2, then each addition on top of those before it. The last recipe is today's."""
    recipe = GPT2
    recipes = {GPT2_NAME: recipe}
    for name, change in supported_additions().items():
        recipe = replace(recipe, **change)
        recipes[name] = recipe
    return recipes


def leave_one_out() -> dict[str, Recipe]:
    """Today's recipe, each time without one of its parts."""
    recipes = {}
    for name, change in supported_additions().items():
        if name == "+ character copy head":
            continue  # today's recipe without it is the last but one of cumulative()
        if name == "+ copy head":
            name = "+ copy heads"  # the character copy head needs the other one
        removal = {key: getattr(GPT2, key) for key in change}
        recipes["without " + name.removeprefix("+ ")] = replace(Recipe(), **removal)
    return recipes


def alternatives() -> dict[str, Recipe]:
    """Today's recipe, each time with one change."""
    return {name: replace(Recipe(), **change) for name, change in ALTERNATIVES.items()}
