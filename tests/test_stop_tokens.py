"""The tokens that end an answer of an adopted model, in whichever places its files name them."""

import json

import pytest

from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.model_folder import load_tokenizer, save_model
from nanoghost.formats.stop_tokens import ids_after_answer
from nanoghost.home import ModelFolder
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.chat_format import CHAT_TEMPLATE, render
from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tokenizer.reply_parser import parse_reply
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.engine_toys import ScriptedModel
from tests.support.gguf_files import read_gguf, write_gguf
from tests.support.toys import TOY_TEMPLATE, random_llama_folder, toy_text

END_OF_TEXT, START, END, CALL, END_OF_CALL = range(5)  # ids of <|endoftext|>, <|im_start|>, <|im_end|>, <tool_call> ...
WORD = 290  # an ordinary token


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(300)], 300)


@pytest.fixture
def source(tokenizer, home):
    """A Hugging Face folder with a chat template of its own, which ends an answer with <|im_end|>."""
    folder = random_llama_folder("source", LlamaConfig(tokenizer.vocab_size, 64, 2, 64, 4, 2, 96), tokenizer).path
    change_json(folder / "tokenizer_config.json", chat_template=TOY_TEMPLATE)
    return folder


def change_json(path, **changes) -> None:
    """None removes a key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def set_ends(source, config, generation, token: str) -> None:
    """What the three files say; None: nothing."""
    change_json(source / "config.json", eos_token_id=config)
    change_json(source / "tokenizer_config.json", eos_token=token)
    change_json(source / "generation_config.json", eos_token_id=generation)


def stop_ids(name: str) -> set[int]:
    return load_tokenizer(ModelFolder(name).path).stop_ids


def adopt(nanoghost, source, name: str = "adopted") -> set[int]:
    code, _, err = nanoghost("adopt", source, "--name", name)
    assert code == 0, err
    return stop_ids(name)


@pytest.mark.parametrize(
    ("config", "generation", "token", "expected"),
    [
        (END, None, "<|im_end|>", {END}),
        (END, END_OF_TEXT, "<|im_end|>", {END, END_OF_TEXT}),
        (END, [END, END_OF_TEXT], "<|endoftext|>", {END, END_OF_TEXT}),
        (END_OF_TEXT, END_OF_TEXT, "<|endoftext|>", {END, END_OF_TEXT}),  # the template alone ends with <|im_end|>
        (None, None, "<|endoftext|>", {END, END_OF_TEXT}),
        ([END_OF_CALL], CALL, "<|endoftext|>", {END, END_OF_TEXT, CALL, END_OF_CALL}),
        (WORD, None, "<|im_end|>", {END}),  # the default of a class, for another vocabulary
        (128001, [128001, END], "<|im_end|>", {END}),  # no token of this vocabulary
    ],
)
def test_every_place_counts_and_so_does_the_template(nanoghost, source, config, generation, token, expected):
    set_ends(source, config, generation, token)
    assert adopt(nanoghost, source) == expected
    for name in ("config.json", "generation_config.json"):  # for other programs, which read one of them
        values = json.loads((ModelFolder("adopted").path / name).read_text())
        assert values["eos_token_id"] == sorted(expected)


def test_a_generation_config_may_be_missing(nanoghost, source):
    set_ends(source, END_OF_TEXT, None, "<|endoftext|>")
    (source / "generation_config.json").unlink()
    assert adopt(nanoghost, source) == {END, END_OF_TEXT}


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}END{% endfor %}"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("<|im_end|>", {END}),
        (" {{ eos_token }}\n", {END_OF_TEXT}),
        ("{% if m.role == 'assistant' %}\n\n</tool_call><|im_end|>{% endif %}", {END_OF_CALL}),
        ("\n", set()),
    ],
)
def test_the_first_token_after_an_answer_that_is_not_text_ends_it(tokenizer, end, expected):
    tokenizer.chat_template = ChatTemplate(TEMPLATE.replace("END", end), {"eos_token": "<|endoftext|>"}, set())
    assert ids_after_answer(tokenizer) == expected
    tokenizer.chat_template = None


def test_an_end_token_may_be_an_added_token_that_is_not_special(nanoghost, source):
    """Its text is no part of an answer, and nobody can type it."""
    tokens = json.loads((source / "tokenizer.json").read_text())
    for token in tokens["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (source / "tokenizer.json").write_text(json.dumps(tokens))
    set_ends(source, None, END_OF_TEXT, "<|endoftext|>")
    assert adopt(nanoghost, source) == {END, END_OF_TEXT}
    tokenizer = load_tokenizer(ModelFolder("adopted").path)
    assert parse_reply([*tokenizer.encode("Good day."), END], tokenizer)["content"] == "Good day."
    ids, _ = render([{"role": "user", "content": "<|im_end|>"}], tokenizer)
    assert ids.count(END) == 2  # of the system message that the template adds, and of the user's message


def test_an_eos_token_that_is_an_ordinary_word_in_tokenizer_json_is_made_special(nanoghost, source):
    """Transformers regards the tokens that tokenizer_config.json names as special, wherever they come from."""
    tokens = json.loads((source / "tokenizer.json").read_text())
    tokens["added_tokens"] = [token for token in tokens["added_tokens"] if token["content"] != "<|endoftext|>"]
    tokens["model"]["vocab"]["endoftext"] = tokens["model"]["vocab"].pop("<|endoftext|>")
    (source / "tokenizer.json").write_text(json.dumps(tokens))
    change_json(source / "tokenizer_config.json", bos_token=None)
    set_ends(source, None, None, "endoftext")
    assert adopt(nanoghost, source) == {END, END_OF_TEXT}
    assert load_tokenizer(ModelFolder("adopted").path).special_tokens["endoftext"] == END_OF_TEXT


def test_an_adopted_model_stops_at_each_of_its_end_tokens(nanoghost, source):
    set_ends(source, END, END_OF_TEXT, "<|im_end|>")
    adopt(nanoghost, source)
    tokenizer = load_tokenizer(ModelFolder("adopted").path)
    prompt, _ = render([{"role": "user", "content": "Hello"}], tokenizer, add_generation_prompt=True)
    answer = tokenizer.encode("Good day.")
    for end in (END, END_OF_TEXT):
        model = ScriptedModel(tokenizer, prompt, [*answer, end, *answer, *answer])
        [sequence] = generate(model, tokenizer, [prompt], SamplingParams(20, temperature=0))
        assert sequence.finish_reason == "stop"
        assert sequence.messages[-1]["content"] == "Good day."


# -- our export -------------------------------------------------------------------------------------------------------


def test_a_model_trained_here_names_both_of_its_end_tokens(tokenizer, tmp_path):
    save_model(tmp_path, Llama(LlamaConfig(tokenizer.vocab_size, 64, 2, 64, 4, 2, 96)), tokenizer)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text())["eos_token_id"] == [END_OF_TEXT, END]


@pytest.mark.parametrize("template", [TOY_TEMPLATE, None], ids=["adopted", "trained here"])
def test_export_and_adoption_keep_all_end_tokens(nanoghost, source, tmp_path, template):
    expected = {END, END_OF_TEXT, CALL} if template else {END, END_OF_TEXT}
    change_json(source / "tokenizer_config.json", chat_template=template or CHAT_TEMPLATE)
    set_ends(source, END, sorted(expected), "<|im_end|>")
    assert adopt(nanoghost, source) == expected
    path = tmp_path / "model.gguf"
    assert nanoghost("export", "adopted", "--quant", "f32", "--out", path)[0] == 0
    named = [GGUFFile(path).fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert set(named) - {None} == expected
    assert named[0] == END
    assert adopt(nanoghost, path, "from_gguf") == expected
    assert adopt(nanoghost, ModelFolder("adopted").path, "from_folder") == expected


def test_more_end_tokens_than_gguf_can_express_are_refused(nanoghost, source, tmp_path):
    set_ends(source, END, [END_OF_TEXT, CALL, END_OF_CALL], "<|im_end|>")
    adopt(nanoghost, source)
    code, _, err = nanoghost("export", "adopted", "--out", tmp_path / "model.gguf")
    assert code == 2
    assert "4 tokens end an answer" in err
    assert not list(tmp_path.glob("*.gguf"))


# -- GGUF files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eos_token_id": END_OF_TEXT}, {END, END_OF_TEXT}),  # the end of a text; the template says <|im_end|>
        ({"eos_token_id": END}, {END}),
        ({"eos_token_id": END_OF_TEXT, "eot_token_id": CALL, "eom_token_id": END_OF_CALL}, {0, END, CALL, END_OF_CALL}),
        ({"eos_token_id": WORD}, {END, WORD}),  # an ordinary token by its type, but named as the end
    ],
)
def test_end_tokens_of_a_gguf_file(nanoghost, source, tmp_path, changes, expected):
    adopt(nanoghost, source)
    assert nanoghost("export", "adopted", "--quant", "f32", "--out", tmp_path / "whole.gguf")[0] == 0
    fields, tensors = read_gguf(tmp_path / "whole.gguf")
    for name in ("eos", "eot", "eom"):
        fields.pop(f"tokenizer.ggml.{name}_token_id", None)
    fields |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    write_gguf(tmp_path / "changed.gguf", fields, tensors)
    assert adopt(nanoghost, tmp_path / "changed.gguf", "changed") == expected
