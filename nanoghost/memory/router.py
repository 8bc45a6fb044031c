"""The router: a message about the user's own life goes to the adapter, every other message to the base model.

So a night cannot change how sums, stories and the capital of France are answered. The router is a logistic regression
over words and word bigrams, trained on the synthetic questions of nights and on general prompts. It knows nothing
about any person and is the same for everybody.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from nanoghost.home import home, read_json, write_json
from nanoghost.memory.phrasings import phrasings, relations, seeded_rng, select_split
from nanoghost.memory.synthesize import CHECK_QUESTIONS, arithmetic_prompt, question_phrasings
from nanoghost.tokenizer.chat_format import text_of

QUESTIONS_PER_RELATION = 30
PAIR_AND_CHECK_QUESTIONS = 300  # of each kind
ARITHMETIC_PROMPT_COUNT = 60
WEIGHT_DECAY = 0.1
# Log-odds above which a message is personal. On the validation questions 1% of the personal ones stay below.
THRESHOLD = -2.0
PRONOUNS = frozenset("and he her him his it its one she that them there they theirs this".split())


@dataclass(frozen=True)
class Router:
    weights: dict[str, float]
    """Weight of each word and bigram."""
    bias: float

    def log_odds(self, text: str) -> float:
        """Log-odds that a message is personal."""
        return self.bias + sum(self.weights.get(ngram, 0.0) for ngram in word_ngrams(text))

    def is_personal(self, messages: list[dict]) -> bool:
        """Whether the last user message is about the user's own life.

        A message with a pronoun ("And where does she live?") is also scored together with the user message before it.
        """
        texts = [text_of(m) for m in messages if m["role"] == "user"]
        if self.log_odds(texts[-1]) > THRESHOLD:
            return True
        refers_back = not PRONOUNS.isdisjoint(re.findall(r"\w+", texts[-1].casefold()))
        return refers_back and len(texts) > 1 and self.log_odds(" ".join(texts[-2:])) > THRESHOLD


def word_ngrams(text: str) -> list[str]:
    """The words and word bigrams of a text, each once; every number is "#"."""
    words = ["#" if word.isdigit() else word for word in re.findall(r"\w+", text.casefold())]
    bigrams = [f"{a} {b}" for a, b in pairwise(["^", *words, "$"])]
    return list(dict.fromkeys(words + bigrams))


def training_messages() -> tuple[list[str], list[str]]:
    """(personal messages, general messages)"""
    rng = seeded_rng("router")
    personal = []
    for relation in relations():
        questions, _ = question_phrasings(relation)
        personal += questions[:QUESTIONS_PER_RELATION]
    personal += select_split(phrasings()["out_of_schema_questions"], "train")
    schema = list(relations().values())
    for _ in range(PAIR_AND_CHECK_QUESTIONS):
        a, b = rng.sample(schema, 2)
        pair_phrasing = rng.choice(phrasings()["two_relation_questions"]["train"])
        personal.append(pair_phrasing.format(a=a.relation, b=b.relation))
        personal.append(rng.choice(CHECK_QUESTIONS).format(a=a.relation, v=rng.choice(a.values)))
    general = list(phrasings()["general_prompts"]["train"])
    general += [arithmetic_prompt(rng) for _ in range(ARITHMETIC_PROMPT_COUNT)]
    return personal, general


def train_router(personal: list[str], general: list[str]) -> Router:
    """Logistic regression; both classes have the same total weight."""
    index: dict[str, int] = {}
    rows = [[index.setdefault(ngram, len(index)) for ngram in word_ngrams(text)] for text in [*personal, *general]]
    ngram_ids = torch.tensor([i for row in rows for i in row])
    offsets = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)
    targets = torch.tensor([1.0] * len(personal) + [0.0] * len(general))
    class_weights = torch.where(targets > 0, len(rows) / 2 / len(personal), len(rows) / 2 / len(general))
    weights = torch.zeros(len(index), 1, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def compute_loss() -> torch.Tensor:
        optimizer.zero_grad()
        log_odds = F.embedding_bag(ngram_ids, weights, offsets, mode="sum")[:, 0] + bias
        loss = F.binary_cross_entropy_with_logits(log_odds, targets, class_weights, reduction="sum")
        loss = loss + WEIGHT_DECAY * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    return Router({ngram: round(weights[i].item(), 4) for ngram, i in index.items()}, round(bias.item(), 4))


@cache
def load_router() -> Router:
    """The router, from the data folder; trained first, which takes a few seconds, if it is not there.

    Cached for the life of the process: the weights depend on the phrasings alone, on no person and no model.
    """
    personal, general = training_messages()
    key = hashlib.sha256(json.dumps([personal, general, WEIGHT_DECAY]).encode()).hexdigest()[:12]
    path: Path = home() / "data" / f"router-{key}.json"
    if not path.exists():
        router = train_router(personal, general)
        write_json(path, {"bias": router.bias, "weights": router.weights})
    stored = read_json(path)
    return Router(stored["weights"], stored["bias"])
