"""Folders and names that people give as --data: links, files of other kinds, pipes, names that are not text."""

import os
import re

import pytest

from nanoghost.data.local import open_local
from nanoghost.data.registry import open_data_source
from nanoghost.errors import UserError
from nanoghost.tools.retrieval import DocumentFolder


def text_of_source(path) -> str:
    return "".join(document.text for document in open_data_source(str(path)).documents())


def test_links_in_a_folder_are_followed_once_and_what_is_skipped_is_named(tmp_path, capsys):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "z").mkdir(parents=True)
    (elsewhere / "deeper").mkdir(parents=True)
    (data / "z" / "one.txt").write_text("one")
    (elsewhere / "two.txt").write_text("two")
    (elsewhere / "deeper" / "three.md").write_text("three")
    (data / "linked").symlink_to(elsewhere)
    (data / "file.txt").symlink_to(elsewhere / "two.txt")
    (data / "a loop").symlink_to(data)
    (elsewhere / "deeper" / "loop").symlink_to(elsewhere)
    (data / "b").symlink_to(data / "z")
    (data / "broken.txt").symlink_to("nowhere")
    (data / "self.txt").symlink_to("self.txt")
    (data / ".git").mkdir()
    for name in ("image.png", "table.csv", "package.json", "noending", "x.tar.gz"):
        (data / name).write_text("{}")
    os.mkfifo(data / "pipe.txt")
    names = {document.name for document in open_local(data).documents()}
    assert names == {"z/one.txt", "linked/two.txt", "linked/deeper/three.md", "file.txt"}
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{data}: skipped ")
    groups = dict(re.findall(r"(\d+ [a-z, ]+?) \(([^)]*)\)", line))
    assert groups == {
        "1 hidden": ".git",
        "2 behind broken links": "broken.txt, self.txt",
        "6 of other kinds": "image.png, noending, package.json, ...",
        "3 linked, but read already": "a loop, b, linked/deeper/loop",
    }


def test_files_without_permission_are_named(tmp_path, capsys, monkeypatch):
    """The superuser may read everything, so the answer of the system is replaced."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "secret.txt").write_text("two")
    monkeypatch.setattr(os, "access", lambda path, mode: "secret" not in str(path))
    assert text_of_source(tmp_path) == "one"
    assert capsys.readouterr().err == f"{tmp_path}: skipped 1 without permission to read (secret.txt)\n"


def test_what_is_skipped_at_a_url_is_named(tmp_path, capsys):
    for name in ("a.txt", "b.png", ".hidden.txt"):
        (tmp_path / name).write_text("one")
    assert text_of_source(f"file://{tmp_path}") == "one"
    assert capsys.readouterr().err == f"file://{tmp_path}: skipped 1 hidden (.hidden.txt), 1 of other kinds (b.png)\n"


def test_a_file_name_that_is_not_text_is_read(tmp_path):
    (tmp_path / os.fsdecode(b"na\xefve.txt")).write_text("one")
    assert text_of_source(tmp_path) == "one"
    assert open_local(tmp_path).fingerprint


def test_documents_to_search_may_be_utf_16_and_what_is_skipped_is_named(tmp_path, capsys):
    notes = tmp_path / "notes"
    (notes / ".git").mkdir(parents=True)
    (notes / "windows.txt").write_text("The queen lives in the blue hive.", encoding="utf-16")
    (notes / "binary.txt").write_bytes(b"queen \0 queen")
    (notes / "unmarked.md").write_bytes("queen".encode("utf-16-le"))
    (notes / "link").symlink_to(tmp_path)
    (notes / "program.py").write_text("queen")
    assert [passage.source for passage in DocumentFolder(notes).search("queen", 10)] == ["windows.txt"]
    assert capsys.readouterr().err == (
        f"{notes}: skipped 1 hidden (.git), 1 behind links (link), 1 of other kinds (program.py),"
        " 2 without text (binary.txt, unmarked.md)\n"
    )


def test_a_pipe_is_refused_where_a_file_is_expected(tmp_path):
    """Opening it would wait for a writer forever."""
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is a pipe or a device"):
        open_data_source(str(tmp_path / "pipe.txt"))


def test_an_empty_data_name_does_not_mean_the_current_folder(tmp_path, monkeypatch):
    """Such as --data "$TEXT" with an unset variable."""
    (tmp_path / "a.txt").write_text("Some text.")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--data is empty"):
        open_data_source("")
