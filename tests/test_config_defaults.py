"""config.json of the Llama family: keys that it leaves out, nulls, RoPE parameters in all their places.

The reference is Hugging Face transformers: `make parity` compares each key of each family with it.
"""

import copy
import json

import pytest
import torch

from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.validation import check_llama_config
from nanoghost.home import ModelFolder
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import CLASS_DEFAULTS, LlamaConfig
from nanoghost.model.registry import LLAMA_FAMILY
from nanoghost.model.rope import rope_frequencies
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import GRANITE_MULTIPLIERS, LLAMA3_SCALING, random_llama_folder, toy_text

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}


def read(**values) -> LlamaConfig:
    values = SIZES | values
    check_llama_config(values, "config.json")
    return LlamaConfig.from_json(values)


def rope(config: LlamaConfig) -> tuple:
    return config.rope_base, config.rope_scaling


# -- keys that a file leaves out --------------------------------------------------------------------------------------

EVERY_FOURTH = (3, 7)
UNTOLD = {  # family -> what a file means that says no more than its sizes, and the number of key and value heads
    "llama": {"context": 2048, "rope_base": 1e4, "tied_embeddings": False, "qkv_bias": False, "head_width": 16},
    "mistral": {"context": 131072, "rope_base": 1e4, "tied_embeddings": False, "sliding_windows": (4096,) * 8},
    "qwen2": {"context": 32768, "rope_base": 1e4, "tied_embeddings": False, "qkv_bias": True, "sliding_windows": ()},
    "qwen3": {"context": 32768, "rope_base": 1e4, "tied_embeddings": False, "qk_norm": True, "head_width": 128},
    "smollm3": {"context": 32768, "rope_base": 2e6, "tied_embeddings": True, "no_rope_layers": EVERY_FOURTH},
    "granite": {"context": 2048, "rope_base": 1e4, "tied_embeddings": False, "attention_multiplier": 1.0},
}


@pytest.mark.parametrize("family", LLAMA_FAMILY)
def test_a_key_that_is_left_out_has_the_value_of_the_familys_class(family):
    config = read(model_type=family, num_key_value_heads=2)
    assert {name: getattr(config, name) for name in UNTOLD[family]} == UNTOLD[family]
    assert config.norm_eps == 1e-6


@pytest.mark.parametrize(("family", "expected"), [("llama", 32), ("mistral", 8), ("qwen2", 32), ("smollm3", 4)])
def test_key_value_heads_left_out_differ_from_null(family, expected):
    assert read(model_type=family, num_attention_heads=32).key_value_heads == expected
    assert read(model_type=family, num_attention_heads=16, num_key_value_heads=None).key_value_heads == 16


def test_sliding_windows_that_are_half_told():
    """Qwen has them from a layer on, SmolLM3 in the layers without rotary embedding."""
    qwen = read(model_type="qwen2", num_key_value_heads=2, num_hidden_layers=30, use_sliding_window=True)
    assert qwen.sliding_windows == (0,) * 28 + (4096,) * 2
    smollm3 = read(model_type="smollm3", use_sliding_window=True, sliding_window=9, no_rope_layer_interval=3)
    assert smollm3.no_rope_layers == (2, 5)
    assert smollm3.sliding_windows == (0, 0, 9, 0, 0, 9, 0, 0)
    assert read(model_type="mistral", num_key_value_heads=2, sliding_window=None).sliding_windows == ()


def test_keys_of_other_families_are_not_read():
    """A Qwen2 has the biases that its class gives it, and a Llama no windows."""
    assert read(model_type="qwen2", num_key_value_heads=2, attention_bias=True).out_bias is False
    assert read(model_type="llama", sliding_window=5, no_rope_layers=[0] * 8).sliding_windows == ()
    assert read(model_type="llama", no_rope_layers=[0] * 8).no_rope_layers == ()


@pytest.mark.parametrize("flag", ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"])
@pytest.mark.parametrize("family", LLAMA_FAMILY)
def test_a_null_flag_is_false(family, flag):
    null, false = (read(model_type=family, num_key_value_heads=2, **{flag: value}) for value in (None, False))
    assert null == false


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "rms_norm_eps", "hidden_act", "max_position_embeddings"])
def test_a_null_that_means_nothing_is_refused(key):
    with pytest.raises(UserError, match=f"{key} is missing"):
        read(model_type="llama", **{key: None})


# -- RoPE -------------------------------------------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, (1e6, None)),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, (5e5, None)),
        ({"rope_theta": None}, (1e4, None)),
        ({"rope_theta": 5e5, "rope_scaling": LINEAR | {"rope_theta": None}}, (5e5, LINEAR)),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, (1e4, LINEAR)),
        ({"rope_parameters": LINEAR | {"rope_theta": 1e6}}, (1e6, LINEAR)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, (1e4, {"type": "linear", "factor": 2.0})),
        ({"rope_scaling": YARN | {"truncate": None}}, (1e4, YARN | {"original_max_position_embeddings": 2048})),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, (1e6, None)),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            (1e6, None),  # no layer has a sliding window
        ),
    ],
)
def test_rope_parameters_are_found_where_they_stand(values, expected):
    assert rope(read(model_type="llama", **values)) == expected


def test_a_rotary_embedding_for_each_type_of_layer_is_refused_unless_they_are_equal():
    windows = {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 4}
    two = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(UserError, match="each type of layer"):
        read(model_type="qwen3", rope_parameters=two, **windows)
    equal = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e6}}
    assert read(model_type="qwen3", rope_parameters=equal, **windows).rope_base == 1e6


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_rotary_embeddings_on_a_part_of_each_head_are_refused_wherever_it_is_told(place):
    with pytest.raises(UserError, match="a part of each head"):
        read(model_type="llama", **{place: {"rope_type": "default", "partial_rotary_factor": 0.5}})
    with pytest.raises(UserError, match="a part of each head"):
        read(model_type="llama", partial_rotary_factor=0.5)


# -- what adoption writes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (
            {"model_type": "smollm3", "tied_embeddings": True, "rope_base": 2e6},
            {"tie_word_embeddings": ..., "rope_theta": ...},
        ),
        ({"rope_base": 1e6}, {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ({}, {"tie_word_embeddings": None, "architectures": ["X"]}),
    ],
)
def test_adoption_writes_what_the_file_left_out(nanoghost, settings, change):
    """Other programs read the folder too: a class default, a null and a second place are written as one plain value.

    Ellipsis: the key is left out.
    """
    tokenizer = Tokenizer.train([toy_text(300)], 300)
    config = LlamaConfig(tokenizer.vocab_size, 64, 2, 64, 4, 2, 96, **settings)
    folder = random_llama_folder("source", config, tokenizer)
    written = json.loads((folder.path / "config.json").read_text())
    changed = {key: value for key, value in (written | change).items() if value is not ...}
    (folder.path / "config.json").write_text(json.dumps(changed))
    code, _, err = nanoghost("adopt", folder.path, "--name", "again")
    assert code == 0, err
    assert json.loads((ModelFolder("again").path / "config.json").read_text()) == written
    (before, _), (after, _) = (load_model(ModelFolder(name).path, torch.float32) for name in ("source", "again"))
    ids = torch.arange(20)[None]
    assert torch.equal(before(ids), after(ids))


# -- the reference ----------------------------------------------------------------------------------------------------

COMPLETE = {  # no value is a default of its class
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "rope_theta": 5e5,
    "vocab_size": 300,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "no_rope_layers": [1, 0, 1],
    "no_rope_layer_interval": 2,
    "attention_bias": True,
    "rope_scaling": LLAMA3_SCALING,
    **GRANITE_MULTIPLIERS,
}
CASES = [(family, key, value) for family in LLAMA_FAMILY for key in CLASS_DEFAULTS[family] for value in (None, ...)]


def complete(family: str) -> dict:
    values = {key: value for key, value in COMPLETE.items() if key in CLASS_DEFAULTS[family]}
    if family == "mistral":
        del values["layer_types"]  # transformers ignores them there
    return values | {"model_type": family, "tie_word_embeddings": family != "smollm3", "pad_token_id": None}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: make parity")


def reference_traits(transformers, values: dict) -> dict:
    """What a model of transformers with this config.json consists of and computes."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy(values))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    rotary = type(model.model.rotary_emb)(config)
    layers = [layer.self_attn for layer in model.model.layers]
    windows = [getattr(layer, "sliding_window", None) or 0 for layer in layers]
    if values["model_type"] == "mistral":
        windows = [config.sliding_window or 0] * len(layers)
    return {
        "shapes": {name: tuple(t.shape) for name, t in model.state_dict().items() if name != "lm_head.weight"},
        "tied": config.tie_word_embeddings,
        "context": config.max_position_embeddings,
        "eps": model.model.norm.variance_epsilon,
        "windows": windows,
        "rope": [bool(getattr(layer, "use_rope", True)) for layer in layers],
        "frequencies": (rotary.inv_freq.double() * 1e6).round().tolist(),
        "magnitude": rotary.attention_scaling,
    }


def traits(values: dict) -> dict:
    check_llama_config(values, "config.json")
    config = LlamaConfig.from_json(values)
    with torch.device("meta"):
        model = Llama(config)
    frequencies, magnitude = rope_frequencies(config.head_width, config.rope_base, config.rope_scaling)
    return {
        "shapes": {name: tuple(t.shape) for name, t in model.exported_tensors().items() if name != "lm_head.weight"},
        "tied": config.tied_embeddings,
        "context": config.context,
        "eps": config.norm_eps,
        "windows": list(config.sliding_windows or (0,) * config.depth),
        "rope": [layer not in config.no_rope_layers for layer in range(config.depth)],
        "frequencies": (frequencies.float().double() * 1e6).round().tolist(),
        "magnitude": magnitude,
    }


def null_equivalent(key: str, values: dict):
    """What a null means that only older versions of transformers take; Ellipsis: as if it were left out."""
    if isinstance(CLASS_DEFAULTS[values["model_type"]][key], bool):
        return False
    equivalents = {
        "num_key_value_heads": values["num_attention_heads"],
        "head_dim": 2,  # hidden_size / num_attention_heads
        "rope_theta": ...,
    }
    return equivalents.get(key)


@pytest.mark.parametrize(("family", "key", "value"), CASES)
def test_a_key_left_out_or_null_means_what_it_means_in_transformers(transformers, family, key, value):
    """Ellipsis: left out."""
    values = {name: value for name, value in (complete(family) | {key: value}).items() if value is not ...}
    try:
        expected = reference_traits(transformers, values)
    except Exception:  # of many classes
        equivalent = null_equivalent(key, values) if value is None else None
        if equivalent is None:
            with pytest.raises(UserError, match=key if value is None else "entries for"):
                traits(values)
            return
        replaced = {name: value for name, value in (values | {key: equivalent}).items() if value is not ...}
        expected = reference_traits(transformers, replaced)
    assert traits(values) == expected
