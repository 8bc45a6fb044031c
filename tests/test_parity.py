"""Parity with transformers, where it is installed: the same logits, token ids and prompts.

    make parity     # installs transformers and runs this

Transformers saves a tiny random model of each member of the family. nanoghost adopts it, and both compute in fp32.
"""

import pytest
import torch

from nanoghost import home
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.formats.model_folder import load_model, load_tokenizer
from nanoghost.home import ModelFolder
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import CONVERSATION, GRANITE_MULTIPLIERS, LLAMA3_SCALING, TOY_TEMPLATE, toy_text

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")

SMALL = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING | {"original_max_position_embeddings": 32}}
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
GRANITE4 = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 80,
    "layer_types": ["attention"] * 3,
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "position_embedding_type": "rope",
}
MODELS = {  # id of the test -> (model class of transformers, changes to SMALL)
    "llama": ("Llama", {}),
    "llama, biases, tied": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama 3": ("Llama", LLAMA3),
    "llama, linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, yarn": ("Llama", YARN),
    "llama, wide heads": ("Llama", {"head_dim": 20}),
    "mistral, windows": ("Mistral", {"sliding_window": 5}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "granite": ("Granite", GRANITE_MULTIPLIERS),
    "granite, biases, tied": ("Granite", GRANITE_MULTIPLIERS | {"attention_bias": True, "tie_word_embeddings": True}),
    "granite 4": ("GraniteMoeHybrid", GRANITE_MULTIPLIERS | GRANITE4),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 0], "eos_token_id": None}),  # eos comes from the tokenizer
}


@pytest.fixture(params=MODELS)
def reference(request, tmp_path):
    """(model of transformers, the folder that it was saved in)"""
    family, changes = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # biases and norms start as zeros and ones, which would hide a mistake
                p.add_(torch.randn_like(p) * 0.1)
    folder = tmp_path / "source"
    model.save_pretrained(folder)
    Tokenizer.train([toy_text()], 400).save(folder)
    reference_tokenizer(folder).save_pretrained(folder)
    return model, folder


def reference_tokenizer(folder):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>", bos_token="<|endoftext|>"
    )
    tokenizer.chat_template = TOY_TEMPLATE
    return tokenizer


@pytest.fixture
def adopted(reference, nanoghost) -> ModelFolder:
    _, folder = reference
    code, _, err = nanoghost("adopt", folder, "--name", "adopted")
    assert code == 0, err
    return ModelFolder("adopted")


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def test_logits_equal_those_of_transformers(reference, adopted):
    expected_model, _ = reference
    model, _ = load_model(adopted.path, torch.float32)
    ids = torch.randint(10, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert largest_difference(model(ids), expected_model(ids).logits) <= 1e-4


def test_greedy_tokens_equal_those_of_transformers(reference, adopted):
    """200 tokens with the KV cache."""
    expected_model, _ = reference
    model, _ = load_model(adopted.path, torch.float32)
    ids = torch.randint(10, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = expected_model.generate(ids, max_new_tokens=200, do_sample=False, eos_token_id=None)
    cache, new_ids, generated = model.new_cache(2, 240), ids, []
    with torch.no_grad():
        for _ in range(200):
            new_ids = model(new_ids, cache)[:, -1].argmax(-1, keepdim=True)
            generated.append(new_ids)
    assert torch.equal(torch.cat(generated, 1), expected[:, 40:])


@pytest.mark.parametrize(("message_count", "generation"), [(1, True), (2, False), (3, True), (4, False)])
def test_prompts_equal_those_of_transformers(reference, adopted, message_count, generation):
    expected_tokenizer, tokenizer = reference_tokenizer(reference[1]), load_tokenizer(adopted.path)
    question = {"role": "user", "content": "A naïve  question?\n\n 12345 I'll"}
    messages = [question, *CONVERSATION[1:]][:message_count]
    text = expected_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    expected = expected_tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, _ = render(messages, tokenizer, generation)
    assert ids == expected


@pytest.mark.parametrize("text", ["The king.", "  x\n\ny ", "naïve 你好 🙂", "don't 1066 AND", ""])
def test_token_ids_equal_those_of_transformers(reference, adopted, text):
    expected = reference_tokenizer(reference[1])(text, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(adopted.path).encode(text) == expected


# ── SmolLM2 itself ──────────────────────────────────────────────────────────────────────────────────────────────────

REAL_HOME = home.home()
"""Home folder of the person who runs the tests; each test has its own."""

PROMPTS = (
    "What is the capital of France?",
    "Write a poem about the sea.",
    "How do I boil an egg?",
    "Explain gravity to a child.",
    "List five animals.",
    "What is 12 + 30?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "Write a Python function that reverses a list.",
    "Summarise: The cat sat on the mat. It was happy.",
    "Tell me a joke.",
    "What is photosynthesis?",
    "Why is the sky blue?",
    "Give me three names for a dog.",
    "What rhymes with 'night'?",
    "Is 17 a prime number?",
    "Write a haiku.",
    "How far is the moon?",
    "What does 'ubiquitous' mean?",
    "Hello!",
)
TEXTS = (
    "",
    " ",
    "\n\n",
    "The king.",
    "  x\n\n\ty  ",
    "naïve café 你好 🙂👩‍👩‍👧",
    "don't I'LL 1066 3.14 1,000,000",
    "def f(x):\n    return x**2  # code\n",
    "<|im_end|> <|im_start|>user\n",
    "e\u0301 \u00e9 ﬁ ½",
    "עברית العربية हिन्दी",
    "a\u00a0b\u200bc\r\n",
    "x" * 200,
    "{'a': [1, 2], \"b\": null}",
    "\x00\x1b[0m",
    "<repo_name> <jupyter_start>",
)


@pytest.fixture(scope="module")
def smollm2_folder():
    folder = REAL_HOME / "models" / "smollm2"
    if not (folder / "card.json").exists():
        pytest.skip(f"smollm2 is not adopted in {REAL_HOME}: nanoghost adopt smollm2")
    return folder


def test_smollm2_generates_the_greedy_tokens_of_transformers(smollm2_folder):
    """200 tokens for each prompt.

    Transformers scores what nanoghost generated. At each position its largest logit is that of the generated token, so
    its own greedy continuation is the same.
    """
    expected_model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    model, tokenizer = load_model(smollm2_folder, torch.float32)
    prompts = [render([{"role": "user", "content": p}], tokenizer, add_generation_prompt=True)[0] for p in PROMPTS]
    rows = generate(model, tokenizer, prompts, SamplingParams(200, temperature=0, ignore_eos=True))
    worst = 0.0
    with torch.no_grad():
        for prompt, generated in ((row.prompt_ids, row.completion_ids) for row in rows):
            whole = torch.tensor([prompt + generated])
            expected, actual = expected_model(whole).logits[0], model(whole)[0]
            worst = max(worst, largest_difference(actual, expected))
            assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == generated, tokenizer.decode(prompt)
    print(f"logits differ by at most {worst:.1e}")
    assert worst <= 1e-4


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_folder):
    return load_tokenizer(smollm2_folder)


@pytest.fixture(scope="module")
def smollm2_reference_tokenizer(smollm2_folder):
    return transformers.AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module")
def smollm2_text_tokenizer(smollm2_folder):
    """Like ours, it never encodes text as a special token."""
    return transformers.AutoTokenizer.from_pretrained(smollm2_folder, split_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_token_ids_equal_those_of_transformers(smollm2_tokenizer, smollm2_text_tokenizer, text):
    ids = smollm2_tokenizer.encode(text)
    assert ids == smollm2_text_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert smollm2_tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("roles", [("user",), ("user", "assistant", "user"), ("system", "user", "assistant", "user")])
def test_smollm2_prompts_equal_those_of_transformers(
    smollm2_tokenizer, smollm2_reference_tokenizer, text, generation, roles
):
    tokenizer, reference = smollm2_tokenizer, smollm2_reference_tokenizer
    messages = [{"role": role, "content": text + "!"} for role in roles]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    ids, _ = render(messages, tokenizer, generation)
    assert tokenizer.decode(ids, skip_special=False) == expected
    if not any(token in text for token in tokenizer.special_tokens):  # transformers encodes such text as special tokens
        assert ids == reference(expected, add_special_tokens=False)["input_ids"]
