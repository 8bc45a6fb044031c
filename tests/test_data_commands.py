"""The commands `nanoghost data` and `nanoghost tokenizer`."""

import json


def test_data_counts_the_bytes_of_each_split(nanoghost, toy_file):
    code, out, err = nanoghost("data", toy_file, "--vocab-size", 300, "--json")
    assert code == 0, err
    assert json.loads(out)["splits"]["train"]["bytes"] > 0


def test_a_tokenizer_is_trained_and_evaluated_by_name(nanoghost, toy_file):
    code, _, err = nanoghost("tokenizer", "train", "--data", toy_file, "--vocab-size", 300, "--name", "t")
    assert code == 0, err
    code, out, err = nanoghost("tokenizer", "eval", "--name", "t", "--json")
    assert code == 0, err
    assert json.loads(out)["vocab_size"] == 300


def test_data_reports_a_text_that_is_too_short_for_training(nanoghost, tmp_path):
    """The file name has characters that mean something in a glob pattern and in rich's markup."""
    path = tmp_path / "notes[1].txt"
    path.write_text("To be, or not to be. " * 10)
    code, out, err = nanoghost("data", path, "--vocab-size", 280, "--json")
    assert code == 0, err
    assert json.loads(out)["batch_milliseconds"] is None
    assert "notes[1].txt" in json.loads(out)["attribution"]
    code, _, err = nanoghost("data", path, "--vocab-size", 280)
    assert code == 0
    assert "notes[1].txt" in err
    assert "too short" in err
