"""Vocabularies with more rows in the embedding than tokens, and with holes: ids without a token are never sampled.

The model here gives them the highest logits of all.
"""

import json

import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer as Backend

from nanoghost.engine import kernels
from nanoghost.engine.engine import Engine
from nanoghost.engine.generate import generate
from nanoghost.engine.grammar import grammar_tokenizer, json_grammar
from nanoghost.engine.logits_processors import LogitsProcessor
from nanoghost.engine.paged_runner import PagedRunner
from nanoghost.engine.prompt_logprobs import prompt_logprobs
from nanoghost.engine.quantized_llama import quantize_model
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.torch_runner import TorchRunner
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.model_folder import load_tokenizer
from nanoghost.home import ModelFolder
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.serve.engine_messages import Capacity
from nanoghost.serve.http_errors import RequestError
from nanoghost.serve.model_registry import ModelRegistry
from nanoghost.serve.request_parsing import parse_completion_request
from nanoghost.serve.schema import CompletionRequest
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import add_noise, random_llama_folder, toy_text

NO_KERNELS = kernels.unavailable_reason()
RUNNERS = [
    "torch",
    pytest.param("paged", marks=pytest.mark.skipif(bool(NO_KERNELS), reason=f"no kernels: {NO_KERNELS}")),
]
SETTINGS = [
    SamplingParams(12, temperature=0),
    SamplingParams(12, temperature=1),
    SamplingParams(12, temperature=2, top_k=3),
    SamplingParams(12, temperature=1, top_p=0.5),
]


def tokenizer_with_holes() -> Tokenizer:
    """300 tokens, the last one with the id 306: there are no tokens 299 to 305."""
    definition = json.loads(Tokenizer.train([toy_text(300)], 300).to_json())
    vocabulary = definition["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 306
    return Tokenizer(Backend.from_str(json.dumps(definition)))


@pytest.fixture(params=["padded", "holes"])
def tokenizer(request):
    return Tokenizer.train([toy_text(300)], 300) if request.param == "padded" else tokenizer_with_holes()


def model_that_prefers_unused_ids(tokenizer: Tokenizer) -> Llama:
    """320 rows. The rows without a token point in both directions of some vectors, so that one of them always wins."""
    torch.manual_seed(0)
    model = add_noise(Llama(LlamaConfig(320, 256, 2, 64, 2, 1, 96, head_width=64)), 0.2)
    unused = [i for i in range(320) if not tokenizer.has_token(i)]
    for i, j in zip(unused[::2], unused[1::2]):
        model.lm_head.weight.data[i] = 20 * torch.randn(64)
        model.lm_head.weight.data[j] = -model.lm_head.weight.data[i]
    return model


def new_runner(kind: str, model: Llama):
    return TorchRunner(model, 8, 128) if kind == "torch" else PagedRunner(quantize_model(model, 16), 2000)


@pytest.mark.parametrize("kind", RUNNERS)
def test_no_sampler_draws_an_id_without_a_token(tokenizer, kind):
    """Nor do drafts bring one: the prompt repeats itself, so that they are proposed."""
    model = model_that_prefers_unused_ids(tokenizer)
    prompt = tokenizer.encode("The king sees the king sees the king sees")
    with torch.no_grad():
        assert not tokenizer.has_token(int(model(torch.tensor([prompt]))[0, -1].argmax()))
    for sampling in SETTINGS:
        for sequence in generate(new_runner(kind, model), tokenizer, [prompt], sampling, samples=3):
            assert all(map(tokenizer.has_token, sequence.completion_ids))
            assert sequence.messages


@pytest.mark.parametrize("kind", RUNNERS)
def test_a_grammar_and_recorded_log_probabilities_keep_to_the_vocabulary(tokenizer, kind):
    engine = Engine(new_runner(kind, model_that_prefers_unused_ids(tokenizer)), tokenizer)
    [sequence] = engine.add(tokenizer.encode("The"), SamplingParams(12))
    matcher = LLMatcher(grammar_tokenizer(tokenizer), json_grammar({"type": "string", "maxLength": 4}))
    sequence.logits_processor = LogitsProcessor(matcher, num_top_logprobs=20)
    while engine.has_unfinished:
        engine.step()
    assert all(map(tokenizer.has_token, sequence.completion_ids))
    for logprob, top in sequence.logits_processor.recorded_logprobs:
        assert logprob > -1e30
        assert all(tokenizer.has_token(token_id) for token_id, _ in top)


@pytest.mark.parametrize("kind", RUNNERS)
def test_log_probabilities_are_those_of_the_vocabulary_alone(tokenizer, kind):
    model = model_that_prefers_unused_ids(tokenizer)
    ids = tokenizer.encode("The king sees the sea.")
    used = [i for i in range(320) if tokenizer.has_token(i)]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    expected = torch.log_softmax(logits[:-1, used], 1)
    chunks = list(prompt_logprobs(new_runner(kind, model), tokenizer, ids, "", num_top_logprobs=3))
    for row, (token_id, (logprob, top)) in zip(expected, zip(ids[1:], chunks[0])):
        tolerance = 1e-3 if kind == "torch" else 0.3  # weights in bf16
        assert logprob == pytest.approx(float(row[used.index(token_id)]), abs=tolerance)
        assert [value for _, value in top] == pytest.approx(row.topk(3).values.tolist(), abs=tolerance)


def test_a_prompt_of_token_ids_may_only_have_tokens(tokenizer):
    name = f"unused-{len(tokenizer.unused_ids)}"  # the server keeps tokenizers by the name of their model
    random_llama_folder(name, LlamaConfig(320, 64, 2, 64, 4, 2, 96), tokenizer)
    registry = ModelRegistry(None, Capacity(1))
    for token_id in (0, 298, 299, 305, 306, 307, 319, 320):
        request = CompletionRequest.model_validate({"model": name, "prompt": [[5, token_id]]})
        if tokenizer.has_token(token_id):
            assert parse_completion_request(request, registry)[0].prompt_ids == [5, token_id]
        else:
            with pytest.raises(RequestError, match=f"no token {token_id}"):
                parse_completion_request(request, registry)


def test_the_padding_of_a_gguf_file_is_no_vocabulary(nanoghost, tokenizer, tmp_path):
    """GGUF has a name for each row; those of padding are of a type of their own and nothing that a model may say."""
    folder = random_llama_folder("padded", LlamaConfig(320, 64, 2, 64, 4, 2, 96), tokenizer)
    path = tmp_path / "padded.gguf"
    assert nanoghost("export", folder.name, "--quant", "f32", "--out", path)[0] == 0
    assert len(GGUFFile(path).fields["tokenizer.ggml.tokens"]) == 320
    code, _, err = nanoghost("adopt", path, "--name", "again")
    assert code == 0, err
    again = load_tokenizer(ModelFolder("again").path)
    for token_id in range(320):
        assert again.has_token(token_id) == tokenizer.has_token(token_id)
        if tokenizer.has_token(token_id):
            assert again.token_bytes(token_id) == tokenizer.token_bytes(token_id)
