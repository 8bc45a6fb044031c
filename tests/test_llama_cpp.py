"""Against llama.cpp itself, where llama-cpp-python is installed: exported files load there and say the same.

make parity     # builds it (minutes) and runs this
"""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanoghost import home
from nanoghost.formats.gguf_reader import READABLE_TYPES, GGUFFile
from nanoghost.formats.gguf_tokenizer import PRE_TOKENIZERS, bos_post_processor
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.chat_format import render, render_text
from nanoghost.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support.toys import CONVERSATION, LLAMA3_SCALING, random_llama_folder, toy_text

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make parity")

REAL_HOME = home.home()  # that of the one who runs the tests; each test has its own

TEXTS = (
    "The king sees the sea.", "", " ", "\n", "  two\n\n\nlines \t tab  ", "don't I'LL they've", "1066 and 3.14159, 1,000,000",
    "naïve café Ünïcödé", "你好,世界!こんにちは", "🙂👩‍👩‍👧 emoji", "def f(x):\n    return x**2  # code\n", "<|im_end|> <|im_start|>user",
    "Привет, мир", "a\u00a0b\u200bc", "ﬁ ½ ²", "עברית العربية", "\r\n\r\n x", "x" * 60, "__init__ == 'a' != \"b\";",
)  # fmt: skip

CONFIGS = {
    "llama": {},
    "llama, tied, long": {"tied_embeddings": True, "rope_scaling": LLAMA3_SCALING, "rope_base": 500000.0},
    "llama, biases, wide heads": {"qkv_bias": True, "out_bias": True, "head_width": 24},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_width": 24},
    "smollm3": {"model_type": "smollm3", "depth": 5, "no_rope_layers": (3,), "tied_embeddings": True},
}


@pytest.fixture(params=CONFIGS)
def folder(request):
    tokenizer = Tokenizer.train([toy_text()], 400)
    said = {"depth": 2} | CONFIGS[request.param]
    return random_llama_folder(
        "toy", LlamaConfig(420, 256, width=96, heads=4, key_value_heads=2, mlp_width=160, **said), tokenizer
    )


def opened(path):
    """Their model, its cache in fp32 as ours is."""
    return llama_cpp.Llama(
        str(path), n_ctx=256, n_batch=256, n_threads=2, logits_all=True, type_k=0, type_v=0, verbose=False
    )


def their_logits(theirs, ids):
    theirs.reset()
    theirs.eval(ids)
    return np.array(theirs.scores[: len(ids)])


def same_ids(theirs, tokenizer):
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), text
    talk = [m | {"content": m["content"].replace("<|im_end|>", "")} for m in CONVERSATION]
    text = tokenizer.decode(render(talk, tokenizer, True)[0], skip_special=False)
    assert theirs.tokenize(text.encode(), add_bos=False, special=True) == render(talk, tokenizer, True)[0]


def same_greedy_words(theirs, model, ids, count: int, rtol: float) -> None:
    """Their greedy continuation is ours: at each of its places our largest logit, ties aside, is the word they chose."""
    written = list(ids)
    theirs.reset()
    theirs.eval(ids)
    for _ in range(count):
        written.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
        theirs.eval(written[-1:])
    with torch.no_grad():
        ours = model(torch.tensor([written]))[0, len(ids) - 1 : -1]
    chosen = ours.gather(1, torch.tensor(written[len(ids) :])[:, None])[:, 0]
    assert (ours.max(1).values - chosen <= rtol * ours.abs().max()).all()
    assert len(set(written[len(ids) :])) > 3  # it says something


@pytest.mark.parametrize(
    ("quant", "most"), [("f32", 1e-4), ("f16", 3e-3), ("q8_0", 5e-2), ("q4_1", 5e-2), ("q4_0", 5e-2)]
)
def test_an_export_says_the_same_there(nanoghost, folder, tmp_path, quant, most):
    path = tmp_path / "toy.gguf"
    code, _, err = nanoghost("export", folder.name, "--gguf", "--quant", quant, "--out", path)
    assert code == 0, err
    # with the same rounded numbers on both sides, what is left is their arithmetic
    assert nanoghost("adopt", path, "--name", "again")[0] == 0
    model, tokenizer = load_model(ModelFolder("again").path, torch.float32)
    theirs = opened(path)
    own = load_model(folder.path, torch.float32)[1]
    same_ids(theirs, own)
    ids = torch.randint(10, 400, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        a, b = model(torch.tensor([ids]))[0].numpy(), their_logits(theirs, ids)
    assert np.linalg.norm(a - b) <= most * np.linalg.norm(a)
    assert theirs.metadata["tokenizer.chat_template"] and theirs.token_eos() in own.stop_ids
    if quant == "f32":
        same_greedy_words(theirs, model, ids, 100, 1e-4)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_words_are_split_as_there(nanoghost, tmp_path, pre):
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = PRE_TOKENIZERS[pre](), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([toy_text(), "\n\n    1234567 1999 2024\n\n", *TEXTS * 3], trainer)
    if pre == "llama-bpe":
        backend.post_processor = bos_post_processor("<|endoftext|>", 0)
    tokenizer = Tokenizer(backend)
    folder = random_llama_folder("toy", LlamaConfig(tokenizer.vocab_size, 256, 1, 32, 2, 2, 64), tokenizer)
    assert nanoghost("export", folder.name, "--gguf", "--out", tmp_path / "toy.gguf")[0] == 0
    theirs = opened(tmp_path / "toy.gguf")
    same_ids(theirs, tokenizer)
    for text in TEXTS[:6]:  # with what it puts before a text, if anything
        whole = backend.encode(text).ids
        assert theirs.tokenize(text.encode(), add_bos=True) == whole and (whole[:1] == [0]) == (pre == "llama-bpe")
    assert nanoghost("adopt", tmp_path / "toy.gguf", "--name", "again")[0] == 0
    again = load_model(ModelFolder("again").path, torch.float32)[1]
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_a_model_made_here_with_arch_llama(nanoghost, toy_file, tmp_path):
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--arch", "llama", "--steps", 30, "--depth", 2,
                             "--context", 64, "--batch", 4, "--vocab-size", 320)  # fmt: skip
    assert code == 0, err
    assert nanoghost("export", "toy", "--gguf", "--quant", "f32", "--out", tmp_path / "toy.gguf")[0] == 0
    model, tokenizer = load_model(ModelFolder("toy").path, torch.float32)
    theirs, ids = opened(tmp_path / "toy.gguf"), tokenizer.encode("The king sees the ")
    same_ids(theirs, tokenizer)
    with torch.no_grad():
        a = model(torch.tensor([ids]))[0].numpy()
    assert np.abs(a - their_logits(theirs, ids)).max() <= 1e-4 * np.abs(a).max()
    same_greedy_words(theirs, model, ids, 40, 1e-4)
    prompt = render_text(CONVERSATION[1:], True).encode()
    assert theirs.tokenize(prompt, add_bos=False, special=True) == render(CONVERSATION[1:], tokenizer, True)[0]


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Traits(ctypes.Structure):
    """The beginning of ggml's `ggml_type_traits`."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleave", ctypes.c_int64), ("bytes", ctypes.c_size_t),
        ("quantised", ctypes.c_bool), ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in READABLE_TYPES if k != "F32"])
def test_every_kind_of_number_is_read_as_they_read_it(tmp_path, kind):
    ggml = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))))
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    number = gguf.GGMLQuantizationType[kind]
    x = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    raw, read = np.zeros(x.nbytes, np.uint8), np.zeros_like(x)
    rows, columns = map(ctypes.c_int64, x.shape)
    at = [ctypes.c_void_p(a.ctypes.data) for a in (x, raw, read)]
    size = ggml.ggml_quantize_chunk(number.value, at[0], at[1], ctypes.c_int64(0), rows, columns, None)
    ggml.ggml_get_type_traits(number.value).contents.to_float(at[1], at[2], x.size)
    w = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    w.add_tensor("x", raw[:size].reshape(8, -1), raw_dtype=number)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    assert np.allclose(GGUFFile(tmp_path / "x.gguf").read_tensor("x"), read, rtol=1e-6, atol=1e-7)
    assert np.abs(read - x).max() < 1.5


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_a_file_of_k_quants_made_there(nanoghost, tmp_path, kind):
    tokenizer = Tokenizer.train([toy_text()], 400)
    folder = random_llama_folder("toy", LlamaConfig(tokenizer.vocab_size, 256, 2, 256, 4, 2, 512), tokenizer)
    assert nanoghost("export", folder.name, "--gguf", "--quant", "f32", "--out", tmp_path / "toy.gguf")[0] == 0
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    path = tmp_path / "small.gguf"
    assert (
        llama_cpp.llama_model_quantize(str(tmp_path / "toy.gguf").encode(), str(path).encode(), ctypes.byref(how)) == 0
    )
    kinds = {t.type.name for t in GGUFFile(path).tensors.values()}
    assert kind.removesuffix("_M") in kinds
    assert nanoghost("adopt", path, "--name", "again")[0] == 0
    model, _ = load_model(ModelFolder("again").path, torch.float32)
    ids = tokenizer.encode("The king sees the sea.")
    with torch.no_grad():
        a, b = model(torch.tensor([ids]))[0].numpy(), their_logits(opened(path), ids)
    assert np.linalg.norm(a - b) <= 3e-2 * np.linalg.norm(a)


# ── SmolLM2 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def smollm2(monkeypatch):
    if not (REAL_HOME / "models" / "smollm2" / "card.json").exists():
        pytest.skip(f"smollm2 is not adopted in {REAL_HOME}: nanoghost adopt smollm2")
    monkeypatch.setenv("NANOGHOST_HOME", str(REAL_HOME))
    return load_model(ModelFolder("smollm2").path, torch.float32)


def test_smollm2_as_it_came_and_as_it_goes(nanoghost, smollm2, tmp_path):
    model, tokenizer = smollm2
    path = tmp_path / "smollm2.gguf"
    ids = render([{"role": "user", "content": "What is the capital of France?"}], tokenizer, True)[0]
    with torch.no_grad():
        a = model(torch.tensor([ids]))[0].numpy()
    original = next((REAL_HOME / "data" / "smollm2").glob("*.gguf"), None)
    if original is None:
        pytest.skip(f"the packaged file is not in {REAL_HOME}: nanoghost adopt smollm2 --force")
    for quant, most in ((None, 0.1), ("f32", 1e-4), ("q8_0", 0.05)):
        if quant:
            assert nanoghost("export", "smollm2", "--gguf", "--quant", quant, "--out", path, "--force")[0] == 0
        theirs = opened(path if quant else original)
        same_ids(theirs, tokenizer)
        b = their_logits(theirs, ids)
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        print(f"{quant or 'as it came'}: logits differ by {error:.1e}")
        assert error <= most
        if quant == "f32":
            same_greedy_words(theirs, model, ids, 100, 1e-4)
