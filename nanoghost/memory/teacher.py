"""The teacher: the base model with the facts in its system message. It answers questions and provides targets.

    answer_questions   the teacher answers; an answer that does not state exactly the facts is replaced
    token_targets      what the adapter learns to predict at each token of an answer: the teacher's top-k probabilities,
                       or, where the teacher did not write the answer, probability 1 for the answer's own token
    general_examples   general prompts, where the base model is the teacher of its own answers

N tokens in the loss, K tokens with their own probability, B = K + 1 buckets (the last one: all other tokens).
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import safetensors.torch
import torch
import torch.nn.functional as F

from nanoghost import hardware
from nanoghost.engine.engine import open_engine
from nanoghost.engine.generate import generate, generate_steps
from nanoghost.engine.sampler import SamplingParams
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, home, write_atomic
from nanoghost.memory.answers import contains_values
from nanoghost.memory.recipe import AdapterRecipe
from nanoghost.memory.synthesize import SyntheticQA
from nanoghost.tokenizer.chat_format import render
from nanoghost.train.packing import TokenizedExample, collate, pack
from nanoghost.train.teacher_cache import teacher_targets

TOP_K = 20
EXAMPLES_AT_ONCE = 16  # examples that are packed into one batch for the teacher
LOG_ZERO = -40.0  # log-probability of every other token where the answer's own token has probability 1
FUNCTION_WORDS = frozenset("a an and at called in is it on s the to you your".split())
QUESTION_TOKENS = 40  # maximum length of a question that the base model generates


@dataclass(frozen=True)
class TokenTargets:
    """Target distributions of the tokens in the loss of one example."""

    ids_NK: torch.Tensor
    """Tokens that have a probability of their own."""
    logprobs_NB: torch.Tensor
    """Their log-probabilities, and that of all other tokens together."""

    def first(self, count: int) -> "TokenTargets":
        """The targets of the first `count` tokens: those that are left if the example was cut off."""
        return TokenTargets(self.ids_NK[:count], self.logprobs_NB[:count])


# -- answers ----------------------------------------------------------------------------------------------------------


def answer_questions(
    examples: list[SyntheticQA],
    runner,
    tokenizer,
    max_tokens: int,
    on_event: Callable[[dict], None] = lambda event: None,
) -> tuple[list[SyntheticQA], int]:
    """Let the teacher answer where there is no answer yet.

    Returns all examples, and how many of the teacher's answers were incorrect and replaced by their fallback.
    """
    unanswered = [qa for qa in examples if qa.answer is None]
    if not unanswered:
        return examples, 0
    prompts = []
    for qa in unanswered:
        prompt, _ = render(qa.messages(with_context=True), tokenizer, add_generation_prompt=True)
        prompts.append(prompt + tokenizer.encode(qa.answer_prefix))
    sequences = []
    for sequences in generate_steps(runner, tokenizer, prompts, SamplingParams(max_tokens, temperature=0.0)):
        finished = sum(bool(sequence.finish_reason) for sequence in sequences)
        on_event({"stage": "synthesize", "step": finished - 1, "steps": len(sequences)})
    answered = {}
    replaced = 0
    for qa, sequence in zip(unanswered, sequences):
        answer = (qa.answer_prefix + sequence.messages[-1]["content"]).strip()
        stopped = sequence.finish_reason == "stop"
        correct = not qa.required_values or (stopped and states_only_the_facts(answer, qa))
        if not correct:
            answer = qa.fallback
            replaced += 1
        answered[id(qa)] = replace(qa, answer=answer, from_teacher=correct, truncated=not stopped)
    return [answered.get(id(qa), qa) for qa in examples], replaced


def states_only_the_facts(answer: str, qa: SyntheticQA) -> bool:
    """Whether an answer contains the required values, and no content word that is not in its prefix or in the facts."""
    allowed = set(words(f"{qa.context} {qa.answer_prefix}")) - {"user"} | FUNCTION_WORDS
    return contains_values(answer, qa.required_values) and allowed.issuperset(words(answer))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


# -- targets ----------------------------------------------------------------------------------------------------------


def tokenize_example(qa: SyntheticQA, tokenizer, with_context: bool, max_tokens: int) -> TokenizedExample:
    """Token ids, and the answer as loss mask, without an end token if the answer was truncated."""
    ids, loss_mask = render(qa.messages(with_context), tokenizer)
    if qa.truncated:
        last_in_loss = max(i for i, in_loss in enumerate(loss_mask) if in_loss)
        max_tokens = min(max_tokens, last_in_loss)
    return TokenizedExample(ids[:max_tokens], loss_mask[:max_tokens])


def answer_ids(example: TokenizedExample) -> torch.Tensor:
    """The tokens of the answer: (N,)."""
    return torch.tensor([token for token, in_loss in zip(example.ids, example.loss_mask) if in_loss])


@torch.no_grad()
def token_targets(model, tokenizer, examples: list[SyntheticQA], recipe: AdapterRecipe) -> list[TokenTargets]:
    """Targets of each example: the teacher's probabilities if it wrote the answer, else the answer's own tokens."""
    targets: list[TokenTargets | None] = [None] * len(examples)
    from_teacher = [i for i, qa in enumerate(examples) if qa.from_teacher]
    context = 2 * recipe.context  # the facts come in addition
    for start in range(0, len(from_teacher), EXAMPLES_AT_ONCE):
        group = from_teacher[start : start + EXAMPLES_AT_ONCE]
        inputs = [tokenize_example(examples[i], tokenizer, with_context=True, max_tokens=context) for i in group]
        rows = pack([len(example.ids) for example in inputs], context + 1, range(len(group)))
        batch = collate(rows, inputs, context, loss_tokens=1)
        ids_NK, logprobs_NB = teacher_targets(model, batch, TOP_K, tokenizer.vocab_size)
        order = [i for row in rows for i in row]
        lengths = [sum(inputs[i].loss_mask) for i in order]
        for i, ids, logprobs in zip(order, ids_NK.split(lengths), logprobs_NB.split(lengths)):
            qa = examples[group[i]]
            teacher = TokenTargets(ids, logprobs)
            targets[group[i]] = sharpen(teacher, inputs[i], qa, tokenizer, recipe) if qa.required_values else teacher
    for i, qa in enumerate(examples):
        if targets[i] is None:
            example = tokenize_example(qa, tokenizer, with_context=False, max_tokens=recipe.context)
            targets[i] = one_hot_targets(example)
    return targets


def sharpen(
    teacher: TokenTargets, example: TokenizedExample, qa: SyntheticQA, tokenizer, recipe: AdapterRecipe
) -> TokenTargets:
    """Mix the teacher's probabilities with the answer's own tokens; in the answer's prefix only the latter count."""
    targets_N1 = answer_ids(example)[:, None]
    weight_N1 = torch.full((len(targets_N1), 1), recipe.teacher_weight)
    weight_N1[: len(tokenizer.encode(qa.answer_prefix))] = 0.0
    one_hot_NB = F.pad((teacher.ids_NK == targets_N1).float(), (0, 1))
    probs_NB = weight_N1 * teacher.logprobs_NB.exp() + (1 - weight_N1) * one_hot_NB
    return TokenTargets(teacher.ids_NK, probs_NB.clamp_min(1e-17).log())  # the log stays finite, as with LOG_ZERO


def one_hot_targets(example: TokenizedExample) -> TokenTargets:
    """Probability 1 for the answer's own token. The other K - 1 ids are arbitrary, but all distinct."""
    targets_N1 = answer_ids(example)[:, None]
    others_NK = torch.arange(TOP_K - 1).expand(len(targets_N1), -1)
    ids_NK = torch.cat([targets_N1, others_NK.where(others_NK != targets_N1, TOP_K - 1)], 1)
    logprobs_NB = torch.full((len(targets_N1), TOP_K + 1), LOG_ZERO)
    logprobs_NB[:, 0] = 0.0
    return TokenTargets(ids_NK, logprobs_NB)


# -- general prompts --------------------------------------------------------------------------------------------------


def general_examples(
    base: ModelFolder, prompts: list[str], generated: int, recipe: AdapterRecipe
) -> tuple[list[SyntheticQA], list[TokenTargets]]:
    """The base model's answers to `prompts` and to `generated` questions of its own, with its probabilities as targets.

    They depend on the base model, not on a person: computed once, then read from the data folder.
    """
    dtype = hardware.compute_dtype()
    key = [base.card.finished, prompts, generated, recipe.general_tokens, recipe.context, str(dtype)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    path = home() / "data" / f"general-{digest}.safetensors"
    if not path.exists():
        runner = open_engine(base, slots=32, slot_tokens=1024).runner
        model, tokenizer = load_model(base.path, dtype, hardware.device())
        questions = list(prompts)
        if generated:
            questions += generate_questions(generated, runner, tokenizer)
        unanswered = [SyntheticQA("general", question) for question in questions]
        examples, _ = answer_questions(unanswered, runner, tokenizer, recipe.general_tokens)
        targets = token_targets(model, tokenizer, examples, recipe)
        texts = json.dumps([[qa.question, qa.answer, qa.truncated] for qa in examples])
        tensors = {
            "ids": torch.cat([t.ids_NK for t in targets]).int(),
            "logprobs": torch.cat([t.logprobs_NB for t in targets]),
            "lengths": torch.tensor([len(t.ids_NK) for t in targets]),
        }
        write_atomic(path, safetensors.torch.save(tensors, {"examples": texts}))
    with safetensors.safe_open(path, "pt") as f:
        texts = json.loads(f.metadata()["examples"])
        lengths = f.get_tensor("lengths").tolist()
        ids = f.get_tensor("ids").long().split(lengths)
        logprobs = f.get_tensor("logprobs").split(lengths)
    examples = [SyntheticQA("general", q, a, from_teacher=True, truncated=truncated) for q, a, truncated in texts]
    return examples, [TokenTargets(*pair) for pair in zip(ids, logprobs)]


def generate_questions(count: int, runner, tokenizer) -> list[str]:
    """Questions that the base model expects: it continues an empty user message (Xu et al. 2024, "Magpie")."""
    ids_a, ids_b = (render([{"role": "user", "content": text}], tokenizer)[0] for text in ("A", "B"))
    first_difference = next(i for i, (a, b) in enumerate(zip(ids_a, ids_b)) if a != b)
    prompts = [ids_a[:first_difference]] * count
    sampling = SamplingParams(QUESTION_TOKENS, temperature=1.0, top_p=0.95, seed=0, stop=("\n",))
    sequences = generate(runner, tokenizer, prompts, sampling)
    texts = [sequence.messages[0]["content"].strip() for sequence in sequences if sequence.finish_reason == "stop"]
    return list(dict.fromkeys(text for text in texts if len(text) > 3))
