"""Divergence between the next-token distributions of a student and its teacher.

The vocabulary is divided into buckets: one for each of the k tokens that the teacher finds most probable, and one for
all other tokens together. The true next token always has its own bucket: if it is not among the k, it replaces the
last one. Both distributions are at temperature 1 and sum to 1 over the buckets, so a divergence of 0 means that they
agree on the buckets. Merging tokens can only make a divergence smaller; with k = V it is exact.

    beta   divergence                                       the student
    0      KL(teacher || student)                           is mode-covering                 Hinton et al. 2015
    1      KL(student || teacher)                           is mode-seeking                  Gu et al. 2024, MiniLLM
    else   beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student:
           generalized Jensen-Shannon                                                        Agarwal et al. 2024, GKD

N positions, D width, V vocabulary, K tokens with their own bucket, B = K + 1 buckets; R rows, T tokens in a row.
"""

import math

import torch

from nanoghost.model.ghost import Ghost
from nanoghost.model.layers import LOGITS_CHUNK
from nanoghost.model.layout import causal_layout


def teacher_buckets(logits_NV, targets_N, k: int):
    """ids_NK of the tokens with their own bucket, and logprobs_NB, the teacher's log P of each bucket, in fp32."""
    logprobs_NV = torch.log_softmax(logits_NV.float(), 1)
    ids_NK = logprobs_NV.topk(min(k, logits_NV.size(1)), 1).indices
    missing_N = (ids_NK != targets_N[:, None]).all(1)
    ids_NK[missing_N, -1] = targets_N[missing_N]
    return ids_NK, merge_into_buckets(logprobs_NV, ids_NK)


def divergence(student_NB, teacher_NB, beta: float):
    """Divergence of two log-distributions at each position in nats, (N,)."""

    def kl(p, q):
        return (p.exp() * (p - q)).sum(1)

    if beta == 0:
        return kl(teacher_NB, student_NB)
    if beta == 1:
        return kl(student_NB, teacher_NB)
    middle_NB = torch.logaddexp(teacher_NB + math.log(beta), student_NB + math.log(1 - beta))
    return beta * kl(teacher_NB, middle_NB) + (1 - beta) * kl(student_NB, middle_NB)


def distill_loss(student_NB, teacher_NB, ids_NK, targets_N, beta: float, teacher_weight: float):
    """w x divergence from the teacher + (1 - w) x next-token loss at each position, (N,); w is `teacher_weight`."""
    true_bucket_N1 = (ids_NK == targets_N[:, None]).int().argmax(1, keepdim=True)
    next_token_loss_N = -student_NB.gather(1, true_bucket_N1)[:, 0]
    divergence_N = divergence(student_NB, teacher_NB, beta)
    return teacher_weight * divergence_N + (1 - teacher_weight) * next_token_loss_N


# -- the student's buckets --------------------------------------------------------------------------------------------


def student_bucket_logprobs(model, tokens_RT, ids_NK, segments_RT, positions):
    """log P of the tokens `ids_NK` at each of `positions` (row, position), and of all others together: (N, B) fp32."""
    if isinstance(model, Ghost):  # its copy heads change the output distribution, which only `forward` computes
        return merge_into_buckets(model(tokens_RT, segments_BT=segments_RT)[positions], ids_NK)
    h_RTD = model.hidden(tokens_RT, causal_layout(tokens_RT, model.dtype, segments_RT))
    return bucket_logprobs(h_RTD[positions], model.head_weight, ids_NK)


def logits_at(model, tokens_RT, segments_RT, positions):
    """Logits (N, V) at `positions` only: with a large vocabulary the head costs more than the rest of a small model."""
    if isinstance(model, Ghost):
        return model(tokens_RT, segments_BT=segments_RT)[positions]
    return model.hidden(tokens_RT, causal_layout(tokens_RT, model.dtype, segments_RT))[positions] @ model.head_weight.T


def bucket_logprobs(hidden_ND, head_VD, ids_NK):
    """log P of the buckets (N, B) from hidden states, in chunks: the fp32 logits of the whole batch are never in
    memory.

    The probability of the last bucket is a sum over its tokens. 1 minus the others could be 0 or negative by rounding.
    """
    return _BucketLogProbs.apply(hidden_ND, head_VD, ids_NK)


def merge_into_buckets(logprobs_NV, ids_NK):
    """log P of the buckets (N, B) from the log-probabilities of the whole vocabulary."""
    return _bucket_probs(logprobs_NV.exp(), ids_NK).log()


class _BucketLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, ids_NK):
        N, K = ids_NK.shape
        probs_NV = torch.empty(N, len(head_VD), dtype=hidden_ND.dtype, device=hidden_ND.device)
        buckets_NB = torch.empty(N, K + 1, dtype=torch.float32, device=hidden_ND.device)
        for s in _chunks(N, len(head_VD)):
            probs_NV[s] = torch.softmax(hidden_ND[s] @ head_VD.T, 1)
            buckets_NB[s] = _bucket_probs(probs_NV[s], ids_NK[s])
        ctx.save_for_backward(hidden_ND, head_VD, ids_NK, probs_NV, buckets_NB)
        return buckets_NB.log()

    @staticmethod
    def backward(ctx, grad_NB):
        hidden_ND, head_VD, ids_NK, probs_NV, buckets_NB = ctx.saved_tensors
        # d log P(bucket) / d logit(token) = (p(token) / P(bucket) if the token is in the bucket, else 0) - p(token)
        total_N1 = grad_NB.sum(1, keepdim=True)
        ids_grad_NK = grad_NB[:, :-1] - buckets_NB[:, :-1] * total_N1
        others_N1 = grad_NB[:, -1:] / buckets_NB[:, -1:] - total_N1
        grad_logits = probs_NV.mul_(others_N1.to(probs_NV.dtype))  # in place: they are not needed again
        grad_logits.scatter_(1, ids_NK, ids_grad_NK.to(probs_NV.dtype))
        grad_head = grad_logits.T @ hidden_ND if ctx.needs_input_grad[1] else None
        return grad_logits @ head_VD, grad_head, None


def _chunks(positions: int, vocabulary: int):
    """Slices of positions: LOGITS_CHUNK positions with a vocabulary of 4096, fewer with a larger one."""
    size = max(1, LOGITS_CHUNK * 4096 // vocabulary)
    return [slice(i, i + size) for i in range(0, positions, size)]


def _bucket_probs(probs_NV, ids_NK):
    """Probabilities of K tokens and of all others together: (N, B) fp32, at least 1e-30 so that their log is finite."""
    others_N = probs_NV.scatter(1, ids_NK, 0.0).sum(1, dtype=torch.float32)
    return torch.cat([probs_NV.gather(1, ids_NK).float(), others_N[:, None]], 1).clamp_min(1e-30)
