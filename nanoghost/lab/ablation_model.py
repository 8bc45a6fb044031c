"""The model of the ablations: a ghost with a switch for each of its parts. With all of them off it is a GPT-2 of 2019.

With the default recipe it equals the model of model/ghost.py, which has no switches, bit for bit; a test checks that.

B batch, T time, S = T, D width, V vocabulary, N = B * T positions, K width of a pointer.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.lab.ablation_recipes import Recipe
from nanoghost.model import character_features
from nanoghost.model.copy_heads import (
    COPY,
    MIN_PROBABILITY,
    POINTER_WIDTH,
    pointer_attention,
    values_of_predecessors,
)
from nanoghost.model.ghost import MLP, Attention, Block, Ghost, GhostConfig
from nanoghost.model.layers import Embedding, Linear, attend, norm, relu_squared, rotate, token_logprobs
from nanoghost.model.layout import Layout, causal_layout


class LayerNorm(nn.Module):
    """nn.LayerNorm with parameters in fp32 and input in the compute dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype))


class RMSNormWithoutWeight(nn.Module):
    """The norm of a ghost as a module."""

    def forward(self, x):
        return norm(x)


def make_norm(recipe: Recipe) -> nn.Module:
    return RMSNormWithoutWeight() if recipe.rms_norm else LayerNorm(recipe.width)


def add_bias(linear: Linear) -> None:
    linear.bias = nn.Parameter(torch.zeros(linear.out_features))


class AblationAttention(Attention):
    """The ghost's attention; QK-norm and rotary positions can be off, biases on."""

    def __init__(self, config: GhostConfig, layer: int, has_value_embedding: bool, recipe: Recipe):
        super().__init__(config, layer, has_value_embedding)
        self.recipe = recipe
        if not recipe.rms_norm:
            add_bias(self.qkv)
            add_bias(self.out)

    def forward(self, x_BTD, value_embedding_BTD, cos_TK, sin_TK, mask_BTS):
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, self.num_matrices, self.heads, self.head_width)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if self.recipe.qk_norm:
            qk = norm(qk)
        if self.recipe.rotary:
            qk = rotate(qk, cos_TK, sin_TK)
        if self.value_mix is not None:
            v = v + self.value_mix.to(v.dtype) * value_embedding_BTD.view_as(v)
        scale = (self.scale if self.recipe.qk_norm else 1.0) / self.head_width**0.5
        return self.out(attend(qk[:, :, 0], qk[:, :, 1], v, mask_BTS, scale=scale))


class AblationMLP(MLP):
    """The ghost's MLP; it can have GELU instead of squared ReLU, and biases."""

    def __init__(self, config: GhostConfig, recipe: Recipe):
        super().__init__(config)
        self.recipe = recipe
        if not recipe.rms_norm:
            add_bias(self.up)
            add_bias(self.down)

    def forward(self, x_BTD):
        h_BTF = self.up(x_BTD)
        h_BTF = relu_squared(h_BTF) if self.recipe.relu_squared else F.gelu(h_BTF, approximate="tanh")
        return self.down(h_BTF)


class AblationBlock(Block):
    """The ghost's block; LayerNorm can replace RMSNorm, the embedding shortcut and zero initialization can be off."""

    def __init__(self, config: GhostConfig, layer: int, has_value_embedding: bool, recipe: Recipe):
        super().__init__(config, layer, has_value_embedding)
        self.recipe, self.depth = recipe, config.depth
        self.attention = AblationAttention(config, layer, has_value_embedding, recipe)
        self.mlp = AblationMLP(config, recipe)
        self.attention_norm, self.mlp_norm = make_norm(recipe), make_norm(recipe)
        if not recipe.embedding_shortcut:
            self.residual_mix = None

    def init_weights(self) -> None:
        super().init_weights()
        if not self.recipe.zero_init:
            std = 0.02
            for linear in (self.attention.qkv, self.mlp.up):
                nn.init.normal_(linear.weight, std=std)
            # As in GPT-2: smaller in deeper models, because the outputs of all blocks add up
            for linear in (self.attention.out, self.mlp.down):
                nn.init.normal_(linear.weight, std=std / (2 * self.depth) ** 0.5)

    def forward(self, x_BTD, embedding_BTD, value_embedding_BTD, cos_TK, sin_TK, mask_BTS):
        if self.residual_mix is not None:
            stream, shortcut = self.residual_mix.to(x_BTD.dtype)
            x_BTD = x_BTD * stream + embedding_BTD * shortcut
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), value_embedding_BTD, cos_TK, sin_TK, mask_BTS)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class AblationModel(Ghost):
    """A ghost built by a recipe. It can be trained and scored with `logprobs`; without a cache it cannot generate."""

    def __init__(self, recipe: Recipe):
        config = GhostConfig(
            vocab_size=recipe.vocab_size,
            context=recipe.context,
            depth=recipe.depth,
            width=recipe.width,
            head_width=recipe.head_width,
            bigram_rows=max(recipe.bigram_rows, 1),
        )
        super().__init__(config)
        self.recipe = recipe
        self.replace_blocks()
        if not recipe.value_embeddings:
            self.value_embeddings = nn.ModuleList()
        self.position_embedding = None
        if not recipe.rotary:
            self.position_embedding = Embedding(recipe.context, recipe.width)
            self.position_embedding.weight.data.normal_().mul_(0.02)
        self.final_norm = make_norm(recipe)
        self.second_token_head = None
        if recipe.second_token_weight:
            self.second_token_head = Linear(recipe.width, recipe.vocab_size)
            self.second_token_head.weight.data.normal_().mul_(0.001)
        if not recipe.untied_head:
            self.head = None
            self.embedding.weight.data.mul_(0.02 / 0.8)  # standard deviation: 0.8 in a ghost, 0.02 in GPT-2
        self.compute_dtype = torch.float32

    def replace_blocks(self) -> None:
        """Replace the ghost's blocks by blocks with switches.

        The new blocks draw initial weights even if they then take those of the ghost's blocks. So a recipe does not
        change the random draws that follow.
        """
        ghost_weights = self.blocks.state_dict()
        blocks = []
        for layer, ghost_block in enumerate(self.blocks):
            has_value_embedding = self.recipe.value_embeddings and ghost_block.attention.value_mix is not None
            blocks.append(AblationBlock(self.config, layer, has_value_embedding, self.recipe))
        self.blocks = nn.ModuleList(blocks)
        for block in self.blocks:
            block.init_weights()
        if self.recipe.zero_init:
            self.blocks.load_state_dict(ghost_weights, strict=False)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.embedding.weight.to(self.compute_dtype) if self.head is None else self.head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def cast(self, dtype: torch.dtype) -> "AblationModel":
        """Cast the weights of matmuls; a tied head is cast at each use."""
        self.compute_dtype = dtype
        weights = Ghost.matrices(self)
        for head in (self.head, self.second_token_head):
            if head is not None:
                weights.append(head.weight)
        for weight in weights:
            weight.data = weight.data.to(dtype)
        return self

    def hidden_and_words(self, tokens_BT, layout: Layout):
        """As in Ghost, without a cache. The words are None if the recipe does not need them."""
        words = None
        if self.recipe.character_features or self.recipe.copy_heads == 2:
            words = character_features.words_so_far(
                self.character_table, tokens_BT, layout.prev_index_BS, layout.index_BT
            )
        embedding_BTD = self.embed(tokens_BT, layout, words)
        cos, sin = self.cos[layout.positions_BT], self.sin[layout.positions_BT]
        value_embeddings = iter(self.value_embeddings)
        x_BTD = embedding_BTD
        for block in self.blocks:
            value_embedding_BTD = None
            if block.attention.value_mix is not None:
                value_embedding_BTD = next(value_embeddings)(tokens_BT).to(x_BTD.dtype)
            x_BTD = block(x_BTD, embedding_BTD, value_embedding_BTD, cos, sin, layout.mask_BTS)
        return self.final_norm(x_BTD), words

    def embed(self, tokens_BT, layout: Layout, words):
        """Sum of the embeddings that the recipe has, in the compute dtype."""
        x_BTD = self.embedding(tokens_BT)
        if self.recipe.bigram_rows:
            x_BTD = x_BTD + self.bigram_embedding(self.bigram_hash(tokens_BT, layout.previous_tokens(tokens_BT)))
        if self.recipe.character_features:
            x_BTD = x_BTD + self.embed_characters(character_features.word_features(words))
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(layout.positions_BT)
        x_BTD = x_BTD.to(self.dtype)
        return norm(x_BTD) if self.recipe.rms_norm else x_BTD

    def logprobs(self, tokens_BT, targets_BT):
        """log P(target | tokens so far) in fp32, (B, T).

        In training, `second_token_weight` times log P(the token after the target) is added.
        """
        layout = causal_layout(tokens_BT, self.dtype)
        h_BTD, words = self.hidden_and_words(tokens_BT, layout)
        targets_N = targets_BT.flatten()
        copy_distributions = None
        if self.recipe.copy_heads == 2:
            # Before the vocabulary, as in Ghost: the order changes the rounding of gradients
            copy_distributions = self.copy_distributions(h_BTD, words, tokens_BT, layout)
            h_BTD = self.copy_heads.tell_ends(h_BTD, copy_distributions.ended_BT)
        logprobs_N = self.vocabulary_logprobs(h_BTD.flatten(0, 1), self.head_weight, targets_N)
        if self.recipe.copy_heads == 1:
            logprobs_N = self.mix_copy_head(logprobs_N, h_BTD, layout, tokens_BT, targets_BT)
        if copy_distributions is not None:
            all_positions = torch.ones_like(tokens_BT).nonzero(as_tuple=True)
            is_character_V = character_features.is_single_character(self.character_table)
            logprobs_N = copy_distributions.mix_targets(logprobs_N, tokens_BT, targets_N, all_positions, is_character_V)
        if self.second_token_head is not None and torch.is_grad_enabled():
            second_N = self.vocabulary_logprobs(
                h_BTD[:, :-1].flatten(0, 1), self.second_token_head.weight, targets_BT[:, 1:].flatten()
            )
            second_BT = F.pad(second_N.view(len(targets_BT), -1), (0, 1))  # the last position has no second token
            logprobs_N = logprobs_N + self.recipe.second_token_weight * second_BT.flatten()
        return logprobs_N.view_as(targets_BT)

    def vocabulary_logprobs(self, hidden_ND, head_VD, targets_N):
        """log P(target) by an output layer alone, without copy heads: (N,) in fp32."""
        softcap = self.recipe.logit_softcap
        if self.recipe.chunked_loss and not softcap:
            return token_logprobs(hidden_ND, head_VD, targets_N)
        logits_NV = F.linear(hidden_ND, head_VD).float()
        if softcap:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        return -F.cross_entropy(logits_NV, targets_N, reduction="none")

    def mix_copy_head(self, vocabulary_N, hidden_BTD, layout: Layout, tokens_BT, targets_BT):
        """log P(target) of the mixture of vocabulary and copy head, without the character copy head: (N,)."""
        # The weight holds two queries, then two keys; each is (K, D)
        qk_weights = self.copy_heads.qk.weight.unflatten(0, (4, POINTER_WIDTH))
        query_and_key = qk_weights[[COPY, 2 + COPY]].flatten(0, 1)
        qk_BT2K = norm(F.linear(hidden_BTD, query_and_key).unflatten(-1, (2, POINTER_WIDTH)))
        q_BTK, k_BTK = qk_BT2K.unbind(2)
        mask_BTS = layout.mask_BTS.expand(len(q_BTK), -1, -1)
        k_BSK = values_of_predecessors(k_BTK, layout)
        copy_BTS = pointer_attention(q_BTK, k_BSK, mask_BTS, POINTER_WIDTH**-0.5)
        is_target_BTS = tokens_BT[:, None] == targets_BT[..., None]
        pointer_N = (copy_BTS * is_target_BTS).sum(-1, dtype=torch.float32).flatten()
        pointer_logprobs_N = pointer_N.clamp_min(MIN_PROBABILITY).log()
        gates = self.copy_heads.gates
        gate_N = F.linear(hidden_BTD.float(), gates.weight[:1], gates.bias[:1]).flatten()  # log-odds of a copy
        return torch.logaddexp(vocabulary_N + F.logsigmoid(-gate_N), pointer_logprobs_N + F.logsigmoid(gate_N))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """As in Ghost, but only the parameters that the recipe uses, and no empty groups."""
        recipe = self.recipe
        matrices, scalars = [], []
        for block in self.blocks:
            matrices += block.matrices()
            scalars += [mix for mix in (block.residual_mix, block.attention.value_mix) if mix is not None]
        if recipe.untied_head:
            heads, embeddings = [self.head.weight], [self.embedding.weight]
        else:
            heads, embeddings = [self.embedding.weight], []
        heads += [module.weight for module in (self.second_token_head, self.position_embedding) if module is not None]
        if recipe.character_features:
            embeddings.append(self.character_embedding.weight)
        embeddings += [table.weight for table in self.value_embeddings]
        if recipe.copy_heads:
            matrices.append(self.copy_heads.qk.weight)
            scalars += [self.copy_heads.gates.weight, self.copy_heads.gates.bias]
        if recipe.copy_heads == 2:
            scalars.append(self.copy_heads.end_of_word)
        if not recipe.rms_norm:
            scalars += [p for name, p in self.blocks.named_parameters() if "norm" in name or name.endswith("bias")]
            scalars += self.final_norm.parameters()
        groups = {
            "matrices": matrices,
            "head": heads,
            "embeddings": embeddings,
            "bigram_embedding": [self.bigram_embedding.weight] if recipe.bigram_rows else [],
            "scalars": scalars,
        }
        return {name: parameters for name, parameters in groups.items() if parameters}
