"""Who answers: the adapter where a message is about the life of the person who writes it, the base model everywhere else.

So what a night does to an adapter cannot reach sums, stories and the capital of France. A logistic regression over words and
pairs of neighbouring words, taught with the questions that nights learn from and with everyday prompts; it knows nothing of
anybody, and is the same for all.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from nanoghost.home import home, read_json, write_json
from nanoghost.memory import synthesize
from nanoghost.memory.phrases import book, dice, part, relations
from nanoghost.tokenizer.chat_format import text_of

WORDINGS = 30  # of each thing that one may tell
MIXED = 300  # questions about two things, and as many of the kind "is it this?"
SUMS = 60
DECAY = 0.1
PERSONAL = (
    -2.0
)  # log-odds from which on a message is personal: on the validation questions 1% of those that are stay below
REFERS = set("and he her him his it its one she that them there they theirs this".split())


@dataclass(frozen=True)
class Router:
    weights: dict[str, float]
    bias: float

    def odds(self, text: str) -> float:
        """Log-odds that a message is personal."""
        return self.bias + sum(self.weights.get(gram, 0.0) for gram in grams(text))

    def concerns(self, messages: list[dict]) -> bool:
        """Whether the last thing that the user says is personal; where it refers to what was said before, together with that."""
        said = [text_of(m) for m in messages if m["role"] == "user"]
        refers = REFERS & set(re.findall(r"\w+", said[-1].casefold()))
        return self.odds(said[-1]) > PERSONAL or bool(
            refers and len(said) > 1 and self.odds(" ".join(said[-2:])) > PERSONAL
        )


def grams(text: str) -> list[str]:
    """Its words and pairs of neighbours, each once; every number is #."""
    words = ["#" if word.isdigit() else word for word in re.findall(r"\w+", text.casefold())]
    return list(dict.fromkeys(words + [f"{a} {b}" for a, b in pairwise(["^", *words, "$"])]))


def lessons() -> tuple[list[str], list[str]]:
    """(personal messages, others)"""
    rng, known = dice("router"), list(relations().values())
    personal = [q for relation in relations() for q in synthesize.wordings(relation)[0][:WORDINGS]] + list(
        part(book()["unheard"], "train")
    )
    for _ in range(MIXED):
        a, b = rng.sample(known, 2)
        personal.append(rng.choice(book()["combined"]["train"]).format(a=a.relation, b=b.relation))
        personal.append(rng.choice(synthesize.CHECKS).format(a=a.relation, v=rng.choice(a.values)))
    return personal, [*book()["everyday"]["train"], *(synthesize.a_sum(rng) for _ in range(SUMS))]


def fit(personal: list[str], others: list[str]) -> Router:
    """Both kinds weigh the same, however many there are of each."""
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(gram, len(numbers)) for gram in grams(text)] for text in [*personal, *others]]
    flat = torch.tensor([i for row in rows for i in row])
    starts = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)
    is_personal = torch.tensor([1.0] * len(personal) + [0.0] * len(others))
    share = torch.where(is_personal > 0, len(rows) / 2 / len(personal), len(rows) / 2 / len(others))
    weights, bias = torch.zeros(len(numbers), 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        odds = F.embedding_bag(flat, weights, starts, mode="sum")[:, 0] + bias
        found = (
            F.binary_cross_entropy_with_logits(odds, is_personal, share, reduction="sum")
            + DECAY * weights.square().sum()
        )
        found.backward()
        return found

    optimizer.step(loss)
    return Router({gram: round(weights[i].item(), 4) for gram, i in numbers.items()}, round(bias.item(), 4))


@cache
def router() -> Router:
    """Taught once, in a few seconds, and kept in the data folder."""
    personal, others = lessons()
    key = hashlib.sha256(json.dumps([personal, others, DECAY]).encode()).hexdigest()[:12]
    path = home() / "data" / f"router-{key}.json"
    if not path.exists():
        made = fit(personal, others)
        write_json(path, {"bias": made.bias, "weights": made.weights})
    kept = read_json(path)
    return Router(kept["weights"], kept["bias"])
