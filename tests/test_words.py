"""The language of the code: help texts, errors, docstrings and names use the field's words and American spelling."""

import pytest

from tests.support.source_tree import source_tree
from tests.support.words import EXEMPTIONS, check_name, check_package, check_source, check_text

PACKAGES = sorted({module.package for module in source_tree().values()})

BAD_SAMPLE = '''
"""Of everything that is asked."""
class Settings:
    guess: int = 4
    """The rungs that it tries."""
def tokenise(said):
    found = {"licence": said}
    raise UserError(f"this is no number, beside {found}")
'''


@pytest.mark.parametrize("package", PACKAGES)
def test_texts_and_names_use_the_words_of_the_field(package):
    findings = [
        finding for finding in check_package(package) if finding.path.split("/")[0] in (package, f"{package}.py")
    ]
    assert not findings, "\n" + "\n".join(map(str, findings))


@pytest.mark.parametrize(
    "text, word",
    [
        ("Of everything random.", "Of "),
        ("The seats of the engine.", "seats"),
        ("Fast, beside what is possible.", "beside"),
        ("A folder without a manifest is none.", "is none"),
        ("Write down the behaviour.", "behaviour"),
        ("tokenises the text", "tokenises"),
        ("take several numbers with commas between", "with commas between"),
        ("reinforcement finds out", "reinforcement"),
    ],
)
def test_bad_texts_are_found(text, word):
    assert any(f"'{word}'" in problem for problem in check_text(text))


@pytest.mark.parametrize(
    "name", ["said", "found", "left_out", "guess_length", "Rung", "seatsOpen", "tokenise", "colour"]
)
def test_bad_names_are_found(name):
    assert check_name(name)


@pytest.mark.parametrize(
    "text", ["Random seed.", "There is no model yet.", "reinforcement learning (RL)", "our own size"]
)
def test_plain_english_passes(text):
    assert not check_text(text)


def test_every_kind_of_text_and_name_is_read():
    findings = check_source(BAD_SAMPLE, "sample.py")
    assert {finding.kind for finding in findings} == {"docstring", "message", "name"}
    assert {finding.line for finding in findings} == {2, 4, 5, 6, 7, 8}


def test_every_exemption_has_a_reason():
    assert all(exemption.reason for exemption in EXEMPTIONS)
