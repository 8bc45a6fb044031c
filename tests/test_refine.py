"""Refining: duplicates are dropped, whatever their spelling, and nothing else; a kill changes nothing."""

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from nanoghost.data import decontamination, refine_input
from nanoghost.data.registry import open_data_source
from nanoghost.errors import UserError
from nanoghost.tasks.gym import word_list

pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'nanoghost[refine]'")

from nanoghost.data import refine as refine_module  # noqa: E402
from nanoghost.data import refine_pipeline as pipeline  # noqa: E402
from nanoghost.data import refine_settings  # noqa: E402
from nanoghost.data.refine_settings import RefineSettings  # noqa: E402


class Quiet:
    def print(self, *what, **how):
        pass


@pytest.fixture(scope="module", name="refine_pipeline")
def small_refine_pipeline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine_input, "TASK_BYTES", 50_000)  # a few tasks
        patch.setattr(refine_settings, "MAX_HASHES", 40)  # 8 bands
        yield pipeline


@cache
def rare_words() -> list[str]:
    return word_list()[::10]


def prose(rng: random.Random, words: int = 400) -> str:
    """Meaningless sentences: dictionary words between common ones."""
    rare = rare_words()
    common = "the be to of and that have with upon love iustice over".split()
    line = [rng.choice(rare if rng.random() < 0.5 else common) for _ in range(words)]
    return "".join(w + (".\n" if i % 12 == 11 else " ") for i, w in enumerate(line))


def old_spelling(text: str) -> str:
    """Spelled as in 1623: haue, vpon, iustice, and an e at the end of many a word."""
    words = text.replace("v", "u").replace("j", "i").split(" ")
    return " ".join(w + "e" if w and w[-1] in "dkmnrt" else w for w in words)


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    """Forty texts, 6 exact copies, 6 in old spelling, 3 that are not prose, 2 that quote the held-out text."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("text")
    texts = {f"a{i:02}": prose(rng) for i in range(40)}
    secret = prose(rng)
    (folder / "held_out.txt").write_text(secret)
    texts |= {f"copy{i}": texts[f"a{i:02}"].replace("\n", "  ") for i in range(6)}
    texts |= {f"old{i}": old_spelling(texts[f"a{i:02}"]) for i in range(10, 16)}
    texts |= {"short": "too short", "signs": "#### " * 300, "again": "the same of that line again and\n" * 80}
    texts |= {
        "quote": prose(rng) + " ".join(secret.split()[50:70]),
        "oldquote": old_spelling(prose(rng) + " ".join(secret.split()[9:40])),
    }
    texts |= {"innocent": prose(rng) + " ".join(secret.split()[50:60])}  # ten words are not a quotation
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    return folder, list(texts)


@pytest.fixture(scope="module")
def settings(crawl):
    return RefineSettings(str(crawl[0] / "d.jsonl"), "clean", decontaminate=str(crawl[0] / "held_out.txt"), workers=2)


@pytest.fixture(scope="module")
def refined(refine_pipeline, settings, tmp_path_factory):
    """The home in which it was done undisturbed, and the manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGHOST_HOME", str(tmp_path_factory.mktemp("home")))
        manifest = refine_module.refine(settings, Quiet())
        return Path(os.environ["NANOGHOST_HOME"]), manifest


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def contents(home: Path) -> dict:
    folder = home / "data" / "clean"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ── what goes, and why ───────────────────────────────────────────────────────────────────────────────────────────────


def test_documents_are_dropped_for_their_reasons_and_no_others(refined, crawl):
    (home, manifest), names = refined, crawl[1]

    def called(file):
        return [names[int(row["name"].rpartition(":")[2]) - 1] for row in rows(file)]

    def dropped(reason):
        return [name for f in sorted((home / "data/clean/dropped" / reason).glob("*.jsonl")) for name in called(f)]

    assert dropped("exact copy") == [f"copy{i}" for i in range(6)]
    assert dropped("similar") == [f"old{i}" for i in range(10, 16)]
    assert sorted(dropped("held out")) == ["oldquote", "quote"]
    assert sorted(dropped("quality") + dropped("repetition")) == ["again", "short", "signs"]
    assert [name for file in manifest["files"] for name in called(home / "data/clean" / file)] == [
        *names[:40],
        "innocent",
    ]
    assert manifest["output"]["documents"] == 41
    assert manifest["input"]["documents"] == len(names)
    assert (
        manifest["output"]["bytes"] + sum(d["bytes"] for d in manifest["dropped"].values())
        == manifest["input"]["bytes"]
    )
    output_rows = [row for file in manifest["files"] for row in rows(home / "data/clean" / file)]
    clusters = [row["cluster"] for row in output_rows if "cluster" in row]
    assert len(clusters) == len(set(clusters)) == 6  # one of each pair


def test_refined_text_is_a_source(refined, settings, nanoghost, monkeypatch):
    home, manifest = refined
    monkeypatch.setenv("NANOGHOST_HOME", str(home))
    source = open_data_source("clean")
    output_rows = [row["text"] for file in manifest["files"] for row in rows(home / "data/clean" / file)]
    assert [d.text for d in source.documents()] == output_rows
    assert source.license == "unknown (local files)"
    assert "refined: 41 of 58 documents" in source.attribution
    assert not (home / "data" / ".refine-clean").exists()
    assert refine_module.refine(settings, Quiet()) == manifest  # it is there already
    code, _, err = nanoghost("data", "refine", settings.data, "--name", "clean", "--decontaminate", "none")
    assert code == 2
    assert "made with other settings or of other text" in err
    file = home / "data" / "clean" / "00000.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="00000.jsonl is damaged .* refine again"):
        list(open_data_source("clean").documents())
    file.write_bytes(whole)


def test_the_output_does_not_depend_on_the_number_of_processes(refine_pipeline, refined, settings, home):
    refine_module.refine(replace(settings, workers=1), Quiet())
    assert contents(home) == contents(refined[0])


def test_other_executors_of_datatrove_give_the_same_output(refine_pipeline, refined, settings, home):
    """The local one is tried here; Slurm's and Ray's are given the same stages."""
    from datatrove.executor import LocalPipelineExecutor

    work, stages = refine_module.prepare(settings)
    refine_pipeline.run_stages(stages, work / "done", LocalPipelineExecutor, workers=1)
    refine_module.refine(settings, Quiet())
    assert contents(home) == contents(refined[0])


def test_a_run_that_is_killed_in_every_stage_gives_the_same_output(refine_pipeline, refined, settings, home):
    work, finished = home / "data" / ".refine-clean", {}
    for mark in (
        "input/00001.jsonl",
        "done/filter/completions/00001",
        "done/signatures/completions/*1",
        "pairs",
        "output/*",
    ):
        if not (child := os.fork()):
            try:
                os.setsid()
                refine_module.refine(settings, Quiet())
            finally:
                os._exit(0)
        while not (there := list(work.glob(mark))) and not os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not there:
            break  # it was through sooner than we looked
        deadline = time.time() + 10
        while alive(child):  # the workers end by themselves
            assert time.time() < deadline
            time.sleep(0.02)
        now = {p: p.stat().st_mtime_ns for p in work.glob("done/*/completions/*")}
        assert finished.items() <= now.items()  # no finished task was repeated
        finished = now
    assert finished
    refine_module.refine(settings, Quiet())
    assert contents(home) == contents(refined[0])


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_held_out_problems_are_removed(refine_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(decontamination, "PROBLEMS", 30)
    decontamination.build_index("tasks", tmp_path / "index.npz")
    rng, held_out_filter = random.Random(1), refine_pipeline.HeldOutFilter(tmp_path / "index.npz")
    problem = "State the final answer to the following arithmetic problem: 17 + 38 ="
    assert problem in decontamination.held_out_texts("tasks")
    assert held_out_filter.filter(refine_pipeline.Document(prose(rng) + problem + prose(rng), "")) == (False, "tasks")
    assert (
        held_out_filter.filter(refine_pipeline.Document(prose(rng) + problem.replace("17", "1234") + prose(rng), ""))
        is True
    )


# ── MinHash ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_minhash_bands_find_similar_pairs(refine_pipeline, monkeypatch):
    monkeypatch.setattr(refine_settings, "MAX_HASHES", 256)
    for similarity in (0.2, 0.3, 0.5, 0.7, 0.9, 0.95):
        bands, rows = refine_settings.minhash_bands(similarity)
        assert bands * rows <= refine_settings.MAX_HASHES

        def detection_probability(s, b=bands, r=rows):
            return 1 - (1 - s**r) ** b

        assert 0.55 < detection_probability(similarity) < 0.75
        assert detection_probability(similarity / 3) < 0.15
        assert detection_probability(similarity**0.3) > 0.9


def test_signatures_estimate_the_jaccard_similarity(refine_pipeline):
    config = refine_pipeline.MinhashConfig(3, 32, 5, hash_config=refine_pipeline.HashConfig(hash_fc="sha1"))
    step = refine_pipeline.SpellingInvariantSignature("memory://s", config, refine_pipeline.WhitespaceTokenizer())
    rng = random.Random(0)
    a = prose(rng, 9000)  # more than a block of shingles
    b = a[: len(a) // 2] + prose(rng, 4500)
    sets = [set(step.get_shingles(t)[:, 0].tolist()) for t in (a, b)]
    exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    first, second = (np.array(step.get_signature(step.get_shingles(t))).ravel() for t in (a, b))
    assert abs((first == second).mean() - exact) < 0.12  # 3 standard deviations of 160 draws
    whole = super(refine_pipeline.SpellingInvariantSignature, step).get_signature(step.get_shingles(a))
    assert whole == step.get_signature(step.get_shingles(a))  # blocks change nothing


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "words, message",
    [
        (["--name", "a/b"], "--name cannot be 'a/b'"),
        (["--name", "plays"], "--name cannot be 'plays'"),
        (["--similarity", 0.1], "--similarity must be between 0.2 and 0.95, not 0.1"),
        (["--quality", "best"], "--quality must be gopher or none, not 'best'"),
        (["--workers", 0], "--workers must be at least 1"),
        (["--decontaminate", "nowhere"], "no data called 'nowhere'"),
    ],
)
def test_errors_of_settings(refine_pipeline, nanoghost, toy_file, words, message):
    code, _, err = nanoghost("data", "refine", toy_file, *([] if "--name" in words else ["--name", "x"]), *words)
    assert code == 2
    assert message in err


def test_without_datatrove_the_error_names_the_extra(nanoghost, toy_file, monkeypatch):
    for name in ("refine", "refine_pipeline"):
        monkeypatch.delitem(sys.modules, f"nanoghost.data.{name}")
        monkeypatch.delattr(f"nanoghost.data.{name}")
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.setitem(sys.modules, "datatrove.data", None)
    code, _, err = nanoghost("data", "refine", toy_file, "--name", "x")
    assert code == 2
    assert "pip install 'nanoghost[refine]'" in err


def test_empty_output_is_an_error(refine_pipeline, nanoghost, tmp_path):
    (tmp_path / "d.txt").write_text("short")
    code, _, err = nanoghost("data", "refine", tmp_path / "d.txt", "--name", "x", "--decontaminate", "none")
    assert code == 2
    assert "nothing is left" in err
