"""The acceptance test: a new adapter replaces the old one only if it recalls more and leaves general answers alone.

It measures, with greedy answers and the router in place:
    recall                    questions about stored facts, in held-out phrasings: proportion of correct answers
    false refusals            the same questions: proportion of answers like "You haven't told me."
    correct abstentions       unanswerable questions: proportion of such answers, which are correct there
    general false refusals    general prompts: proportion of such answers
    KL                        divergence of the adapter, without the router, from the base model on general prompts
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanoghost import hardware
from nanoghost.evals.task_accuracy import wilson_interval
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.peft import read_adapter
from nanoghost.home import ModelFolder
from nanoghost.memory.answers import RoutedModel, is_correct, is_refusal
from nanoghost.memory.phrasings import phrasings, relations
from nanoghost.memory.recipe import AdapterRecipe
from nanoghost.memory.router import load_router
from nanoghost.memory.store import Fact
from nanoghost.memory.synthesize import question_phrasings
from nanoghost.memory.teacher import general_examples, tokenize_example
from nanoghost.memory.train_adapter import AdapterExample, divergence_per_token
from nanoghost.model.lora import attach_adapters

HELD_OUT_GENERAL_PROMPTS = 40  # general prompts that are not trained on
UNANSWERABLE_QUESTIONS = 40
MAX_KL_NATS = 0.1  # per token
MAX_FALSE_REFUSALS = 0.1
MAX_GENERAL_FALSE_REFUSALS = 0.05
MIN_RECALL_GAIN = 0.01
MAX_RECALL_LOSS = 0.05  # if there are no new facts, because facts were only deleted


@dataclass(frozen=True)
class AcceptanceResult:
    """Figures of one adapter, or of the base model alone. Proportions are between 0 and 1."""

    recall: float
    recall_low: float
    """Lower end of the 95% confidence interval."""
    recall_high: float
    questions: int
    """Questions about stored facts."""
    false_refusals: float
    correct_abstentions: float
    general_false_refusals: float
    kl_nats: float
    """KL(base || base + adapter) per token, in nats."""
    wrong_answers: list[list[str]]
    """[question, answer] of each question that was answered incorrectly."""
    samples: list[list[str]]
    """Some of the questions with their answers."""

    def to_json(self) -> dict:
        return asdict(self)


def run_acceptance_test(
    base: ModelFolder, adapter: Path | None, facts: list[Fact], recipe: AdapterRecipe
) -> AcceptanceResult:
    """Test an adapter on these facts; `adapter` None: test the base model alone."""
    model = RoutedModel(base, adapter, load_router())
    questions = [(fact, question) for fact in facts for question in held_out_phrasings(fact.relation)]
    answers = model.answer([question for _, question in questions])
    correct = [is_correct(answer, fact.relation, fact.value) for answer, (fact, _) in zip(answers, questions)]
    qa_pairs = [[question, answer] for (_, question), answer in zip(questions, answers)]
    recall_low, recall_high = wilson_interval(sum(correct), len(questions))
    return AcceptanceResult(
        recall=sum(correct) / len(questions),
        recall_low=recall_low,
        recall_high=recall_high,
        questions=len(questions),
        false_refusals=refusal_rate(answers),
        correct_abstentions=refusal_rate(model.answer(unanswerable_phrasings(facts))),
        general_false_refusals=refusal_rate(model.answer(held_out_general_prompts())),
        kl_nats=general_divergence(base, adapter, recipe) if adapter else 0.0,
        wrong_answers=[pair for is_right, pair in zip(correct, qa_pairs) if not is_right],
        samples=qa_pairs[:: max(1, len(questions) // 8)],
    )


def rejection_reasons(before: AcceptanceResult, after: AcceptanceResult, has_new_facts: bool) -> list[str]:
    """Why the new adapter is rejected; empty if it is accepted.

    `before`: the old adapter's result on the same facts. `has_new_facts`: whether there is a fact that the old adapter
    was not trained on. If there is none, because facts were only deleted, recall need not grow.
    """
    required_recall = before.recall + MIN_RECALL_GAIN if has_new_facts else before.recall - MAX_RECALL_LOSS
    reasons = []
    if after.recall < required_recall:
        reasons.append(f"recall {after.recall:.1%} is below {required_recall:.1%} (before: {before.recall:.1%})")
    if after.kl_nats > MAX_KL_NATS:
        reasons.append(f"general answers moved by {after.kl_nats:.3f} nats per token, more than {MAX_KL_NATS}")
    if after.false_refusals > MAX_FALSE_REFUSALS:
        reasons.append(
            f"{after.false_refusals:.1%} of the questions about stored facts are refused,"
            f" more than {MAX_FALSE_REFUSALS:.0%}"
        )
    if after.general_false_refusals > MAX_GENERAL_FALSE_REFUSALS:
        reasons.append(
            f"{after.general_false_refusals:.1%} of the general prompts are refused,"
            f" more than {MAX_GENERAL_FALSE_REFUSALS:.0%}"
        )
    return reasons


# -- questions --------------------------------------------------------------------------------------------------------


def held_out_phrasings(relation: str) -> list[str]:
    """Questions about a relation that no adapter is trained on."""
    _, held_out = question_phrasings(relation)
    return held_out


def unanswerable_phrasings(facts: list[Fact]) -> list[str]:
    """Held-out questions about relations of the schema without a fact."""
    stored = {fact.relation.casefold() for fact in facts}
    missing = [relation for relation in relations() if relation.casefold() not in stored]
    return [held_out_phrasings(relation)[0] for relation in missing[:UNANSWERABLE_QUESTIONS]]


def training_general_prompts() -> list[str]:
    return phrasings()["general_prompts"]["train"][:-HELD_OUT_GENERAL_PROMPTS]


def held_out_general_prompts() -> list[str]:
    return phrasings()["general_prompts"]["train"][-HELD_OUT_GENERAL_PROMPTS:]


# -- figures ----------------------------------------------------------------------------------------------------------


def refusal_rate(answers: list[str]) -> float:
    return sum(map(is_refusal, answers)) / max(1, len(answers))


@torch.no_grad()
def general_divergence(base: ModelFolder, adapter: Path, recipe: AdapterRecipe) -> float:
    """KL(base || base + adapter) per token, on the base model's answers to held-out general prompts, in nats."""
    examples, targets = general_examples(base, held_out_general_prompts(), generated=0, recipe=recipe)
    model, tokenizer = load_model(base.path, hardware.compute_dtype(), hardware.device())
    attach_adapters(model, [read_adapter(adapter, model.config, hardware.compute_dtype())])
    divergences = []
    for qa, target in zip(examples, targets):
        tokens = tokenize_example(qa, tokenizer, with_context=False, max_tokens=recipe.context)
        divergences.append(divergence_per_token(model, [], [AdapterExample(tokens, target)]))
    return torch.cat(divergences).mean().item()
