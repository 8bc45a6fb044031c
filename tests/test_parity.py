"""Against transformers itself, where it is installed: the same numbers, tokens, ids and prompts.

    make parity     # installs transformers and runs this

Tiny random models of each of the family, made and saved by transformers, adopted and compared in fp32.
"""

import pytest
import torch

from nanoghost.chat import render
from nanoghost.model.weights import load_model
from nanoghost.runs import ModelFolder
from nanoghost.tokenizer import Tokenizer
from tests.conftest import toy_text
from tests.test_adopt import LLAMA3, TALK, TEMPLATE

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")

SMALL = {
    "vocab_size": 400, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": ("Llama", {}),
    "llama, biases, tied": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama 3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, yarn": ("Llama", {"rope_scaling": YARN}),
    "llama, wide heads": ("Llama", {"head_dim": 20}),
    "mistral, windows": ("Mistral", {"sliding_window": 5}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 0]}),
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
    fast.chat_template = TEMPLATE
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
    talk = [TALK[1] | {"role": "user", "content": "A naïve  question?\n\n 12345 I'll"}, *TALK[1:]]
    for count, generation in ((1, True), (2, False), (3, True), (4, False)):
        text = fast.apply_chat_template(talk[:count], tokenize=False, add_generation_prompt=generation)
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert render(talk[:count], tokenizer, generation)[0] == ids
    for text in ("The king.", "  x\n\ny ", "naïve 你好 🙂", "don't 1066 AND", ""):
        assert tokenizer.encode(text) == fast(text, add_special_tokens=False)["input_ids"]
