"""Against transformers itself, where it is installed: the same numbers, tokens, ids and prompts.

    make parity     # installs transformers and runs this

Tiny random models of each of the family, made and saved by transformers, adopted and compared in fp32.
"""

import pytest
import torch

from nanoghost import home
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import Sampling
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import CONVERSATION, LLAMA3_SCALING, TOY_TEMPLATE, toy_text

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")

SMALL = {
    "vocab_size": 400, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": ("Llama", {}),
    "llama, biases, tied": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama 3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING | {"original_max_position_embeddings": 32}}),
    "llama, linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, yarn": ("Llama", {"rope_scaling": YARN}),
    "llama, wide heads": ("Llama", {"head_dim": 20}),
    "mistral, windows": ("Mistral", {"sliding_window": 5}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 0], "eos_token_id": None}),  # its tokenizer says it
}


@pytest.fixture(params=MODELS)
def theirs(request, tmp_path):
    """(their model, the folder they saved it in)"""
    kind, more = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL | more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # biases and norms: not only zeros and ones
                p.add_(torch.randn_like(p) * 0.1)
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    ours = Tokenizer.train([toy_text()], 400)
    ours.save(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>", bos_token="<|endoftext|>"
    )
    fast.chat_template = TOY_TEMPLATE
    fast.save_pretrained(folder)
    return model, fast, folder


def test_the_same_numbers_and_the_same_greedy_words(theirs, nanoghost):
    their_model, _, folder = theirs
    code, _, err = nanoghost("adopt", folder, "--name", "adopted")
    assert code == 0, err
    model, _ = load_model(ModelFolder("adopted").path, torch.float32)
    ids = torch.randint(10, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = their_model(ids).logits, model(ids)
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
        cache, x = model.new_cache(2, 240), ids
        written = []
        for _ in range(200):
            x = model(x, cache)[:, -1].argmax(-1, keepdim=True)
            written.append(x)
    best = their_model.generate(ids, max_new_tokens=200, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat(written, 1), best[:, 40:])


def test_the_same_prompts_and_the_same_ids(theirs, nanoghost):
    _, fast, folder = theirs
    assert nanoghost("adopt", folder, "--name", "adopted")[0] == 0
    _, tokenizer = load_model(ModelFolder("adopted").path, torch.float32)
    talk = [CONVERSATION[1] | {"role": "user", "content": "A naïve  question?\n\n 12345 I'll"}, *CONVERSATION[1:]]
    for count, generation in ((1, True), (2, False), (3, True), (4, False)):
        text = fast.apply_chat_template(talk[:count], tokenize=False, add_generation_prompt=generation)
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert render(talk[:count], tokenizer, generation)[0] == ids
    for text in ("The king.", "  x\n\ny ", "naïve 你好 🙂", "don't 1066 AND", ""):
        assert tokenizer.encode(text) == fast(text, add_special_tokens=False)["input_ids"]


# ── SmolLM2 itself ──────────────────────────────────────────────────────────────────────────────────────────────────

REAL_HOME = home.home()  # that of the one who runs the tests; each test has its own

PROMPTS = (
    "What is the capital of France?", "Write a poem about the sea.", "How do I boil an egg?", "Explain gravity to a child.",
    "List five animals.", "What is 12 + 30?", "Translate 'good morning' into Spanish.", "Who wrote Hamlet?",
    "Write a Python function that reverses a list.", "Summarise: The cat sat on the mat. It was happy.", "Tell me a joke.",
    "What is photosynthesis?", "Why is the sky blue?", "Give me three names for a dog.", "What rhymes with 'night'?",
    "Is 17 a prime number?", "Write a haiku.", "How far is the moon?", "What does 'ubiquitous' mean?", "Hello!",
)  # fmt: skip
TEXTS = (
    "", " ", "\n\n", "The king.", "  x\n\n\ty  ", "naïve café 你好 🙂👩‍👩‍👧", "don't I'LL 1066 3.14 1,000,000",
    "def f(x):\n    return x**2  # code\n", "<|im_end|> <|im_start|>user\n", "e\u0301 \u00e9 ﬁ ½", "עברית العربية हिन्दी",
    "a\u00a0b\u200bc\r\n", "x" * 200, "{'a': [1, 2], \"b\": null}", "\x00\x1b[0m", "<repo_name> <jupyter_start>",
)  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
    folder = REAL_HOME / "models" / "smollm2"
    if not (folder / "card.json").exists():
        pytest.skip(f"smollm2 is not adopted in {REAL_HOME}: nanoghost adopt smollm2")
    their_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return (*load_model(folder, torch.float32), their_model, folder)


def test_smollm2_says_the_same_as_in_transformers(smollm2):
    """200 greedy tokens for each prompt. At each of them the largest of their logits is the token we wrote, so their
    own greedy continuation is this one; a tie within rounding would be found below."""
    model, tokenizer, their_model, _ = smollm2
    prompts = [render([{"role": "user", "content": p}], tokenizer, generation=True)[0] for p in PROMPTS]
    worst = 0.0
    rows = generate(model, tokenizer, prompts, Sampling(200, temperature=0, endless=True))
    with torch.no_grad():
        for ids, ours in ((row.prompt, row.ids) for row in rows):
            whole = torch.tensor([ids + ours])
            a, b = their_model(whole).logits[0], model(whole)[0]
            worst = max(worst, float((a - b).abs().max() / a.abs().max()))
            assert a[len(ids) - 1 : -1].argmax(-1).tolist() == ours, tokenizer.decode(ids)
    print(f"logits differ by at most {worst:.1e}")
    assert worst <= 1e-4


def test_smollm2_has_the_same_prompts_and_ids(smollm2):
    _, tokenizer, _, folder = smollm2
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    for text in TEXTS:
        assert tokenizer.encode(text) == plain(text, add_special_tokens=False)["input_ids"], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for text in TEXTS:
        said = [{"role": role, "content": text + "!"} for role in ("system", "user", "assistant", "user")]
        for talk in (said[1:2], said[1:], said):
            for generation in (True, False):
                written = fast.apply_chat_template(talk, tokenize=False, add_generation_prompt=generation)
                ids = render(talk, tokenizer, generation)[0]
                assert tokenizer.decode(ids, skip_special=False) == written
                if not any(mark in text for mark in tokenizer.specials):  # there a mark is a mark, here it stays text
                    assert ids == fast(written, add_special_tokens=False)["input_ids"]
