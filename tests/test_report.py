"""The report of an invented model: every figure is there, nothing is loaded, and hostile text stays text."""

import json
import re

import pytest

from nanoghost.evals.report import write_report
from nanoghost.evals.svg import line_chart, running_median, ticks
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder

STAGES = ("pretrain", "sft", "rl")
NAMES = ("ghost-base", "ghost-sft", "ghost")
HOSTILE = '<script>alert("x")</script><img src=x onerror=y> | [red]`**\x1b[2J\ud800\u202e [link](javascript:z)'


def card(stage: str, parent: ModelCard | None) -> ModelCard:
    i = STAGES.index(stage)
    figures = {
        "tokens": 1000 * (i + 1),
        "seconds": 60.0 * (i + 1),
        "tokens_per_second": 50.0,
        "flops_per_second": 2e9,
        "steps": 40,
        "loss": 3.25,
    }
    if stage == "pretrain":
        figures |= {"bpb": 2.047, "kneser_ney_bpb": 2.283}
    if stage == "rl":
        before, after = {"accuracy": 0.123, "count": 500}, {"accuracy": 0.456, "count": 500}
        figures |= {"accuracy": {"chain_sum": {"before": before, "after": after}}}
    source = {
        "name": "plays",
        "fingerprint": "ad2ac05cc55b2262",
        "license": "CC BY 2.5",
        "attribution": "see http://x.org",
    }
    machine = {
        "cpu": "Abacus",
        "cores": 2,
        "memory_gb": 8.0,
        "instruction_sets": ["avx2"],
        "system": "Linux",
        "gpu": None,
        "dtype": "bfloat16",
        "threads": 2,
        "world_size": 1,
    }
    return ModelCard(
        name=NAMES[i],
        stage=stage,
        parent=parent,
        settings={"seed": 7, "minutes": None},
        seed=7,
        command=f"nanoghost {stage} --seed 7",
        started=1000.0 * i,
        finished=1000.0 * i + 900,
        steps=40,
        parameters=16253194,
        figures=figures,
        data=[source],
        machine=machine,
        versions={"nanoghost": "0.1.0", "torch": "2.13.0"},
        compile={"on": False, "reason": "too short"},
        depth_reason="as requested",
        arch="ghost",
        vocab_size=4096,
        config={"depth": 4},
        parameter_counts={"matrices": 3145728},
    )


def training_events(stage: str) -> list[dict]:
    i = STAGES.index(stage)
    start = {"stage": stage, "time": 1000.0 * i + 1}
    if stage == "rl":
        return [
            start | {"step": s, "pass_rate_chain_sum": s / 40, "entropy": 1.5, "length": 4.0 + s / 40}
            for s in range(40)
        ]
    events = [start | {"step": s, "loss": 8 / (s + 1) + i} for s in range(40)]
    if stage == "pretrain":
        events += [start | {"step": 19.5, "validation_bpb": 2.417}, start | {"step": 35.5, "validation_bpb": 2.109}]
    return events


def evaluation_event(stage: str, reply: str) -> dict:
    i = STAGES.index(stage)
    call = {"id": "1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "12 + 30"}'}}
    conversation = [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": reply},
    ]
    accuracy = {"accuracy": 0.311 + i / 10, "low": 0.271 + i / 10, "high": 0.351 + i / 10, "count": 500}
    return {
        "stage": f"{stage}-eval",
        "step": 40,
        "time": 1000.0 * i + 950,
        "model": NAMES[i],
        "bpb": 2.047 + i / 10,
        "kneser_ney_bpb": 2.283,
        "seconds": 12.3,
        "samples": [{"messages": conversation}],
        "tasks": {"sums": {"label": "sums with the calculator"} | accuracy},
        "memorized": {"characters": 41 + i, "text": reply, "source": "The Tempest"},
    }


def finished_model(last: str = "rl", reply: str = "12 + 30 = 42.", evaluated: bool = True) -> ModelFolder:
    """A finished model with the events of all its stages; `reply` is what it answers."""
    model_card, events = None, []
    for stage in STAGES[: STAGES.index(last) + 1]:
        model_card = card(stage, model_card)
        events += training_events(stage)
        if evaluated:
            events.append(evaluation_event(stage, reply))
    folder = ModelFolder(model_card.name)
    folder.path.mkdir(parents=True)
    folder.write_card(model_card)
    write_events(folder, events)
    return folder


def write_events(folder: ModelFolder, events: list[dict]) -> None:
    (folder.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def report_texts(folder: ModelFolder) -> tuple[str, str]:
    """(HTML, Markdown)"""
    page = write_report(folder)
    return page.read_text(), page.with_suffix(".md").read_text()


FIGURES = (
    *("16.3 million", "6.0 minutes", "3,000", "180"),  # parameters, total time, tokens and seconds of the last stage
    *("2.047", "2.147", "2.247", "2.283"),  # bits per byte of each stage and of the n-gram baseline
    *("31.1%", "41.1%", "51.1%", "27% to 35%", "47% to 55%"),  # accuracy and its interval
    *("43 characters", "The Tempest", "calculator", "12 + 30"),
    *("nanoghost rl --seed 7", "Abacus", "CC BY 2.5", "torch 2.13.0", "too short"),
)


@pytest.mark.parametrize("figure", FIGURES)
def test_page_and_markdown_contain_every_figure(figure):
    for text in report_texts(finished_model()):
        assert figure in text


def test_the_best_stage_is_bold():
    html, markdown = report_texts(finished_model())
    assert re.findall(r"<b>(.*?)</b>", html) == ["2.047", "51.1% (47% to 55%)"]
    assert re.findall(r"\*\*(.*?)\*\*", markdown) == ["2.047", "51.1% (47% to 55%)"]


def test_the_page_has_an_icon_and_six_charts():
    html, _ = report_texts(finished_model())
    assert html.count("<svg viewBox") == 7  # icon, loss, validation, SFT loss, pass rate, entropy, length
    assert html.count('class="level"') == 1  # the n-gram baseline


def test_larger_values_are_higher_in_a_chart():
    (points,) = re.findall(r'points="(.*?)"', line_chart("t", {"a": [(0, 0.0), (10, 1.0)]}, "step"))
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
    assert x0 < x1
    assert y0 > y1


def test_a_running_median_removes_an_outlier():
    assert running_median([(i, 1.0 if i != 5 else 99.0) for i in range(10)]) == [(i, 1.0) for i in range(10)]


@pytest.mark.parametrize("low, high", [(0, 1), (3.4, 5.6), (0, 360), (2.0596, 2.4513), (1e-9, 3e-9), (-5, 12345)])
def test_ticks_are_few_and_inside_the_range(low, high):
    values = ticks(low, high)
    assert 2 <= len(values) <= 8
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)


def test_hostile_replies_are_shown_as_text(nanoghost):
    html, markdown = report_texts(finished_model(reply=HOSTILE))
    assert "&lt;script&gt;" in html
    for bad in ("<script", "<img", "\x1b", "\u202e"):
        assert bad not in html
        assert bad not in markdown.replace("\\<", "")
    code, _, err = nanoghost("report", "ghost")
    assert code == 0
    assert "\x1b[2J" not in err


def test_hostile_names_and_roles_are_escaped(nanoghost):
    folder = finished_model()
    model_card = folder.card
    model_card.data[0] |= {"license": HOSTILE}
    model_card.parent.parent.data[0] |= {"name": HOSTILE.replace("\ud800", "")}
    folder.write_card(model_card)
    events = folder.events
    events[-1]["samples"][0]["messages"][0]["role"] = 'user"><script>'
    write_events(folder, events)
    html, _ = report_texts(folder)
    assert "<script" not in html
    assert 'user"><script' not in html
    assert nanoghost("report", "ghost")[0] == 0


def test_writing_a_report_again_gives_the_same_files():
    folder = finished_model()
    assert report_texts(folder) == report_texts(folder)


@pytest.mark.parametrize("reference", ["src=", "href=", "url(", "@import", "<link", "<script"])
def test_the_page_loads_nothing(reference):
    html, _ = report_texts(finished_model())
    assert reference not in html


def test_a_model_without_evaluations_has_a_shorter_report(nanoghost):
    html, markdown = report_texts(finished_model("pretrain", evaluated=False))
    assert "Evaluation" not in html + markdown
    assert "Samples" not in html + markdown
    code, out, _ = nanoghost("report", "ghost-base", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "ghost-base"
