"""A flag that would have no effect is an error of one line."""

import re

import pytest

from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import random_llama_folder, toy_text


@pytest.mark.parametrize(
    "command, message",
    [
        ("chat toy --lookup --prompt hi", "--lookup .* needs --person"),
        ("sft toy --name new --lora-alpha 16", "--lora-alpha needs --lora"),
        ("rl toy --name new --lora-targets q,k", "--lora-targets needs --lora"),
        ("distill toy --teacher toy --name new --beta 0.5", "--beta has no effect with --kind sequence"),
        ("distill toy --teacher toy --name new --kind token --temperature 1", "--temperature has no effect"),
        ("memory --person ada --mentions keep", "--mentions needs --forget"),
        ("memory --person ada --model toy", "--model needs --forget"),
    ],
)
def test_a_flag_without_effect_is_refused(nanoghost, home, command, message):
    tokenizer = Tokenizer.train([toy_text(100)], 300)
    random_llama_folder("toy", LlamaConfig(tokenizer.vocab_size, 512, 2, 64, 1, 1, 64), tokenizer)
    code, _, err = nanoghost(*command.split())
    assert code == 2
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert [path.name for path in (home / "models").iterdir()] == ["toy"]
