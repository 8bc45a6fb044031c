"""Parity with llama.cpp, where llama-cpp-python is installed: exported files give the same logits.

`make parity` builds llama-cpp-python (minutes) and runs this.
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
from tests.support.toys import CONVERSATION, GRANITE_MULTIPLIERS, LLAMA3_SCALING, random_llama_folder, toy_text

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make parity")

REAL_HOME = home.home()  # of the person who runs the tests; each test has a home folder of its own

TEXTS = (
    "The king sees the sea.",
    "",
    " ",
    "\n",
    "  two\n\n\nlines \t tab  ",
    "don't I'LL they've",
    "1066 and 3.14159, 1,000,000",
    "naïve café Ünïcödé",
    "你好,世界!こんにちは",
    "🙂👩‍👩‍👧 emoji",
    "def f(x):\n    return x**2  # code\n",
    "<|im_end|> <|im_start|>user",
    "Привет, мир",
    "a\u00a0b\u200bc",
    "ﬁ ½ ²",
    "עברית العربية",
    "\r\n\r\n x",
    "x" * 60,
    "__init__ == 'a' != \"b\";",
)

CONFIGS = {
    "llama": {},
    "llama, tied, long": {"tied_embeddings": True, "rope_scaling": LLAMA3_SCALING, "rope_base": 500000.0},
    "llama, biases, wide heads": {"qkv_bias": True, "out_bias": True, "head_width": 24},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_width": 24},
    "granite": {"model_type": "granite", **GRANITE_MULTIPLIERS},
    "smollm3": {"model_type": "smollm3", "depth": 5, "no_rope_layers": (3,), "tied_embeddings": True},
}


@pytest.fixture(params=CONFIGS)
def folder(request):
    tokenizer = Tokenizer.train([toy_text()], 400)
    settings = {"width": 96, "heads": 4, "key_value_heads": 2, "mlp_width": 160, "depth": 2} | CONFIGS[request.param]
    return random_llama_folder("toy", LlamaConfig(420, 256, **settings), tokenizer)


# -- llama.cpp --------------------------------------------------------------------------------------------------------


def open_in_llama_cpp(path):
    """With a KV cache in fp32, as ours."""
    settings = {"n_ctx": 256, "n_batch": 256, "n_threads": 2, "logits_all": True, "type_k": 0, "type_v": 0}
    return llama_cpp.Llama(str(path), **settings, verbose=False)


def llama_cpp_logits(llama, ids: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


def our_logits(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].numpy()


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def assert_same_tokens(llama, tokenizer: Tokenizer) -> None:
    """Token ids are equal for plain texts and for a rendered conversation with its special tokens."""
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text), text
    messages = [m | {"content": m["content"].replace("<|im_end|>", "")} for m in CONVERSATION]
    ids, _ = render(messages, tokenizer, True)
    text = tokenizer.decode(ids, skip_special=False)
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids


def assert_same_greedy_tokens(llama, model, ids: list[int], count: int, rtol: float) -> None:
    """Each token of llama.cpp's greedy continuation has our highest logit, ties aside."""
    sequence = list(ids)
    llama.reset()
    llama.eval(ids)
    for _ in range(count):
        sequence.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(sequence[-1:])
    completion = sequence[len(ids) :]
    with torch.no_grad():
        logits = model(torch.tensor([sequence]))[0, len(ids) - 1 : -1]
    logits_of_completion = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
    assert (logits.max(1).values - logits_of_completion <= rtol * logits.abs().max()).all()
    assert len(set(completion)) > 3  # a repeated token would prove little


# -- exported files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "tolerance"), [("f32", 1e-4), ("f16", 3e-3), ("q8_0", 5e-2), ("q4_1", 5e-2), ("q4_0", 5e-2)]
)
def test_llama_cpp_computes_the_same_logits_from_an_export(nanoghost, folder, tmp_path, quant, tolerance):
    """Compared with the export, adopted again: both have the same rounded weights, only the arithmetic differs."""
    path = tmp_path / "toy.gguf"
    code, _, err = nanoghost("export", folder.name, "--gguf", "--quant", quant, "--out", path)
    assert code == 0, err
    assert nanoghost("adopt", path, "--name", "again")[0] == 0
    model, _ = load_model(ModelFolder("again").path, torch.float32)
    _, tokenizer = load_model(folder.path, torch.float32)
    llama = open_in_llama_cpp(path)
    assert_same_tokens(llama, tokenizer)
    ids = torch.randint(10, 400, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    assert relative_error(llama_cpp_logits(llama, ids), our_logits(model, ids)) <= tolerance
    assert llama.metadata["tokenizer.chat_template"]
    assert llama.token_eos() in tokenizer.stop_ids
    vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
    assert all(llama_cpp.llama_vocab_is_eog(vocabulary, token_id) for token_id in tokenizer.stop_ids)
    if quant == "f32":
        assert_same_greedy_tokens(llama, model, ids, 100, 1e-4)


def byte_level_tokenizer(pre: str) -> tokenizers.Tokenizer:
    """A BPE tokenizer with one of the pre-tokenizers that GGUF files can name."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([toy_text(), "\n\n    1234567 1999 2024\n\n", *TEXTS * 3], trainer)
    if pre == "llama-bpe":
        backend.post_processor = bos_post_processor("<|endoftext|>", 0)
    return backend


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_splits_as_in_llama_cpp(nanoghost, tmp_path, pre):
    backend = byte_level_tokenizer(pre)
    tokenizer = Tokenizer(backend)
    folder = random_llama_folder("toy", LlamaConfig(tokenizer.vocab_size, 256, 1, 32, 2, 2, 64), tokenizer)
    assert nanoghost("export", folder.name, "--gguf", "--out", tmp_path / "toy.gguf")[0] == 0
    llama = open_in_llama_cpp(tmp_path / "toy.gguf")
    assert_same_tokens(llama, tokenizer)
    for text in TEXTS[:6]:  # with a BOS token, if the tokenizer has one
        ids = backend.encode(text).ids
        assert llama.tokenize(text.encode(), add_bos=True) == ids
        assert (ids[:1] == [0]) == (pre == "llama-bpe")
    assert nanoghost("adopt", tmp_path / "toy.gguf", "--name", "again")[0] == 0
    _, again = load_model(ModelFolder("again").path, torch.float32)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_llama_cpp_computes_the_same_from_a_model_trained_here(nanoghost, toy_file, tmp_path):
    size = ("--depth", 2, "--context", 64, "--batch", 4, "--vocab-size", 320)
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--arch", "llama", "--steps", 30, *size)
    assert code == 0, err
    assert nanoghost("export", "toy", "--gguf", "--quant", "f32", "--out", tmp_path / "toy.gguf")[0] == 0
    model, tokenizer = load_model(ModelFolder("toy").path, torch.float32)
    llama = open_in_llama_cpp(tmp_path / "toy.gguf")
    assert_same_tokens(llama, tokenizer)
    ids = tokenizer.encode("The king sees the ")
    expected = our_logits(model, ids)
    assert np.abs(expected - llama_cpp_logits(llama, ids)).max() <= 1e-4 * np.abs(expected).max()
    assert_same_greedy_tokens(llama, model, ids, 40, 1e-4)
    prompt = render_text(CONVERSATION[1:], True).encode()
    assert llama.tokenize(prompt, add_bos=False, special=True) == render(CONVERSATION[1:], tokenizer, True)[0]


# -- number formats ---------------------------------------------------------------------------------------------------


class TypeTraits(ctypes.Structure):
    """The first fields of ggml's `ggml_type_traits`."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def quantize_with_ggml(x: np.ndarray, quantization_type) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, the numbers that ggml reads from them)."""
    ggml = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.*"))))
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    raw, numbers = np.zeros(x.nbytes, np.uint8), np.zeros_like(x)
    x_pointer, raw_pointer, numbers_pointer = (ctypes.c_void_p(a.ctypes.data) for a in (x, raw, numbers))
    rows, columns = map(ctypes.c_int64, x.shape)
    type_number = quantization_type.value
    size = ggml.ggml_quantize_chunk(type_number, x_pointer, raw_pointer, ctypes.c_int64(0), rows, columns, None)
    ggml.ggml_get_type_traits(type_number).contents.to_float(raw_pointer, numbers_pointer, x.size)
    return raw[:size], numbers


@pytest.mark.parametrize("quantization", [name for name in READABLE_TYPES if name != "F32"])
def test_every_number_format_is_read_as_ggml_reads_it(tmp_path, quantization):
    quantization_type = gguf.GGMLQuantizationType[quantization]
    x = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    raw, numbers = quantize_with_ggml(x, quantization_type)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", raw.reshape(8, -1), raw_dtype=quantization_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert np.allclose(GGUFFile(tmp_path / "x.gguf").read_tensor("x"), numbers, rtol=1e-6, atol=1e-7)
    assert np.abs(numbers - x).max() < 1.5


@pytest.mark.parametrize("quantization", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_a_file_that_llama_cpp_quantized_gives_the_same_logits(nanoghost, tmp_path, quantization):
    tokenizer = Tokenizer.train([toy_text()], 400)
    folder = random_llama_folder("toy", LlamaConfig(tokenizer.vocab_size, 256, 2, 256, 4, 2, 512), tokenizer)
    exported, quantized = tmp_path / "toy.gguf", tmp_path / "small.gguf"
    assert nanoghost("export", folder.name, "--gguf", "--quant", "f32", "--out", exported)[0] == 0
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}")
    paths = str(exported).encode(), str(quantized).encode()
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(settings)) == 0
    types = {tensor.type.name for tensor in GGUFFile(quantized).tensors.values()}
    assert quantization.removesuffix("_M") in types
    assert nanoghost("adopt", quantized, "--name", "again")[0] == 0
    model, _ = load_model(ModelFolder("again").path, torch.float32)
    ids = tokenizer.encode("The king sees the sea.")
    assert relative_error(llama_cpp_logits(open_in_llama_cpp(quantized), ids), our_logits(model, ids)) <= 3e-2


# -- SmolLM2 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def smollm2(monkeypatch):
    if not (REAL_HOME / "models" / "smollm2" / "card.json").exists():
        pytest.skip(f"smollm2 is not adopted in {REAL_HOME}: nanoghost adopt smollm2")
    monkeypatch.setenv("NANOGHOST_HOME", str(REAL_HOME))
    return load_model(ModelFolder("smollm2").path, torch.float32)


@pytest.mark.parametrize(("quant", "tolerance"), [(None, 0.1), ("f32", 1e-4), ("q8_0", 0.05)])
def test_smollm2_gives_the_same_logits_as_shipped_and_exported(nanoghost, smollm2, tmp_path, quant, tolerance):
    """`quant` None: the GGUF file that was adopted."""
    model, tokenizer = smollm2
    path = next((REAL_HOME / "data" / "smollm2").glob("*.gguf"), None)
    if path is None:
        pytest.skip(f"the packaged file is not in {REAL_HOME}: nanoghost adopt smollm2 --force")
    if quant:
        path = tmp_path / "smollm2.gguf"
        assert nanoghost("export", "smollm2", "--gguf", "--quant", quant, "--out", path)[0] == 0
    llama = open_in_llama_cpp(path)
    assert_same_tokens(llama, tokenizer)
    ids, _ = render([{"role": "user", "content": "What is the capital of France?"}], tokenizer, True)
    error = relative_error(llama_cpp_logits(llama, ids), our_logits(model, ids))
    print(f"{quant or 'as shipped'}: logits differ by {error:.1e}")
    assert error <= tolerance
    if quant == "f32":
        assert_same_greedy_tokens(llama, model, ids, 100, 1e-4)
