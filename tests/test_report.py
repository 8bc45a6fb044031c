"""The report of a made-up model: every figure is there, nothing is fetched, nothing a model says is obeyed."""

import json
import re

import pytest

from nanoghost.evals.svg import line_chart, running_median, ticks
from nanoghost.evals.report import write_report
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder

STAGES = ("pretrain", "sft", "rl")
NAMES = ("ghost-base", "ghost-sft", "ghost")
HOSTILE = '<script>alert("x")</script><img src=x onerror=y> | [red]`**\x1b[2J\ud800\u202e [link](javascript:z)'


def card(stage: str, parent: ModelCard | None) -> ModelCard:
    i = STAGES.index(stage)
    result = {"before": {"accuracy": 0.123, "count": 500}, "after": {"accuracy": 0.456, "count": 500}}
    figures = {"tokens": 1000 * (i + 1), "seconds": 60.0 * (i + 1), "tokens_per_second": 50.0, "flops_per_second": 2e9,
               "steps": 40, "loss": 3.25}  # fmt: skip
    figures |= {"bpb": 2.047, "kneser_ney_bpb": 2.283} if stage == "pretrain" else {}
    figures |= {"accuracy": {"chain_sum": result}} if stage == "rl" else {}
    return ModelCard(
        name=NAMES[i], stage=stage, parent=parent, settings={"seed": 7, "minutes": None}, seed=7,
        command=f"nanoghost {stage} --seed 7", started=1000.0 * i, finished=1000.0 * i + 900, steps=40, parameters=16253194,
        figures=figures,
        data=[{"name": "plays", "fingerprint": "ad2ac05cc55b2262", "license": "CC BY 2.5", "attribution": "see http://x.org"}],
        machine={"cpu": "Abacus", "cores": 2, "memory_gb": 8.0, "instruction_sets": ["avx2"], "system": "Linux",
                 "gpu": None, "dtype": "bfloat16", "threads": 2, "world_size": 1},
        versions={"nanoghost": "0.1.0", "torch": "2.13.0"}, compile={"on": False, "reason": "too short"},
        depth_reason="as asked", arch="ghost", vocab_size=4096, config={"depth": 4}, parameter_counts={"matrices": 3145728},
    )  # fmt: skip


def events(stage: str, said: str) -> list[dict]:
    i = STAGES.index(stage)
    start = {"stage": stage, "time": 1000.0 * i + 1}
    if stage == "rl":
        own = [
            start | {"step": s, "pass_rate_chain_sum": s / 40, "entropy": 1.5, "length": 4.0 + s / 40}
            for s in range(40)
        ]
    else:
        own = [start | {"step": s, "loss": 8 / (s + 1) + i} for s in range(40)]
    if stage == "pretrain":
        own += [start | {"step": 19.5, "validation_bpb": 2.417}, start | {"step": 35.5, "validation_bpb": 2.109}]
    call = {"id": "1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "12 + 30"}'}}
    talk = [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": said},
    ]
    return [*own, {
        "stage": f"{stage}-eval", "step": 40, "time": 1000.0 * i + 950, "model": NAMES[i], "bpb": 2.047 + i / 10,
        "kneser_ney_bpb": 2.283, "seconds": 12.3, "samples": [{"messages": talk}],
        "tasks": {"sums": {"label": "sums with the calculator", "accuracy": 0.311 + i / 10, "low": 0.271 + i / 10, "high": 0.351 + i / 10, "count": 500}},
        "memorized": {"characters": 41 + i, "text": said, "source": "The Tempest"},
    }]  # fmt: skip


def folder_of(last: str = "rl", said: str = "12 + 30 = 42.", evaluated: bool = True) -> ModelFolder:
    """A finished model and all that came before it; what it says is `said`."""
    whole, log = None, []
    for stage in STAGES[: STAGES.index(last) + 1]:
        whole = card(stage, whole)
        log += [e for e in events(stage, said) if evaluated or not e["stage"].endswith("-eval")]
    folder = ModelFolder(whole.name)
    folder.path.mkdir(parents=True)
    folder.write_card(whole)
    (folder.path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    return folder


def written(folder: ModelFolder) -> tuple[str, str]:
    page = write_report(folder)
    return page.read_text(), page.with_suffix(".md").read_text()


def test_every_figure_is_told():
    for text in written(folder_of()):
        for figure in (
            "16.3 million", "6.0 minutes", "3,000", "180",  # parameters, time in all, tokens and seconds of the last stage
            "2.047", "2.147", "2.247", "2.283",  # bits per byte, by stage, and of counting
            "31.1%", "41.1%", "51.1%", "27% to 35%", "47% to 55%",  # accuracy and its interval
            "43 characters", "The Tempest", "calculator", "12 + 30", "nanoghost rl --seed 7", "Abacus", "CC BY 2.5",
            "torch 2.13.0", "too short",
        ):  # fmt: skip
            assert figure in text, figure


def test_the_best_of_the_stages_is_bold():
    html, markdown = written(folder_of())
    assert re.findall(r"<b>(.*?)</b>", html) == ["2.047", "51.1% (47% to 55%)"]
    assert re.findall(r"\*\*(.*?)\*\*", markdown) == ["2.047", "51.1% (47% to 55%)"]


def test_curves_are_drawn_through_their_points():
    html, _ = written(folder_of())
    assert html.count("<svg viewBox") == 7  # the ghost, loss, validation, loss, success, entropy, length
    assert html.count('class="level"') == 1
    (points,) = re.findall(r'points="(.*?)"', line_chart("t", {"a": [(0, 0.0), (10, 1.0)]}, "step"))
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in points.split())
    assert x0 < x1 and y0 > y1  # larger is higher up
    assert running_median([(i, 1.0 if i != 5 else 99.0) for i in range(10)]) == [(i, 1.0) for i in range(10)]


@pytest.mark.parametrize("low, high", [(0, 1), (3.4, 5.6), (0, 360), (2.0596, 2.4513), (1e-9, 3e-9), (-5, 12345)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 8 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)


def test_what_a_model_says_is_shown_and_not_obeyed(nanoghost):
    html, markdown = written(folder_of(said=HOSTILE))
    assert "&lt;script&gt;" in html
    for bad in ("<script", "<img", "\x1b", "\u202e"):
        assert bad not in html
        assert bad not in markdown.replace("\\<", "")
    code, _, err = nanoghost("report", "ghost")
    assert code == 0 and "\x1b[2J" not in err


def test_a_hostile_name_or_role_cannot_leave_its_place(nanoghost):
    folder = folder_of()
    whole = folder.card
    whole.data[0] |= {"license": HOSTILE}
    whole.parent.parent.data[0] |= {"name": HOSTILE.replace("\ud800", "")}
    folder.write_card(whole)
    log = folder.events
    log[-1]["samples"][0]["messages"][0]["role"] = 'user"><script>'
    (folder.path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    html, _ = written(folder)
    assert "<script" not in html and 'user"><script' not in html
    assert nanoghost("report", "ghost")[0] == 0


def test_rebuilding_changes_nothing_and_nothing_is_fetched():
    folder = folder_of()
    first = written(folder)
    assert written(folder) == first
    for reference in ("src=", "href=", "url(", "@import", "<link", "<script"):
        assert reference not in first[0]


def test_missing_stages_and_evaluations_are_left_out(nanoghost):
    html, markdown = written(folder_of("pretrain", evaluated=False))
    assert "Evaluation" not in html + markdown and "Samples" not in html + markdown
    code, out, _ = nanoghost("report", "ghost-base", "--json")
    assert code == 0 and json.loads(out)["name"] == "ghost-base"
