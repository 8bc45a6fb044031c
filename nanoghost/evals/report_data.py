"""The contents of a report, gathered from card.json and events.jsonl for page, Markdown and terminal."""

import time
import unicodedata
from dataclasses import dataclass

from nanoghost.evals.svg import line_chart, running_median
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder

STAGE_TITLES = {
    "adopt": "adopted",
    "pretrain": "pretraining",
    "sft": "SFT",
    "distill": "distillation",
    "rl": "RL",
}
TRAINING_COLUMNS = ("stage", "model", "steps", "tokens", "seconds", "tokens/s", "PFLOP")


@dataclass(frozen=True)
class EvaluationRow:
    """One measure, as it was after each stage."""

    label: str
    cells: list[str]
    best: int
    """Index of the best cell."""

    def cells_with_bold_best(self, start: str, end: str) -> list[str]:
        """The cells, the best one between the markup for bold text."""
        cells = list(self.cells)
        cells[self.best] = f"{start}{cells[self.best]}{end}"
        return cells


@dataclass(frozen=True)
class ReportData:
    """A model with all stages that led to it, and the texts and tables of its report."""

    cards: list[ModelCard]
    """Cards of all stages, in the order in which they ran."""
    events: dict[str, list[dict]]
    """Stage -> its events; an evaluation has a stage of its own (sft-eval)."""

    @property
    def card(self) -> ModelCard:
        return self.cards[-1]

    @property
    def is_adopted(self) -> bool:
        return self.cards[0].stage == "adopt"

    @property
    def trained_cards(self) -> list[ModelCard]:
        """Cards of the stages that ran here: all but that of an adopted model."""
        return self.cards[1:] if self.is_adopted else self.cards

    @property
    def evaluations(self) -> dict[str, dict]:
        """Stage -> its last evaluation event."""
        evaluations = {}
        for card in self.cards:
            if events := self.events.get(f"{card.stage}-eval"):
                evaluations[card.stage] = events[-1]
        return evaluations

    def last_evaluation(self) -> dict:
        return list(self.evaluations.values())[-1]

    def headline(self) -> str:
        base = self.cards[0]
        minutes = sum(card.figures["seconds"] for card in self.trained_cards) / 60
        source_names = " and ".join(source["name"] for source in base.data)
        size = f"{base.parameters / 1e6:.1f} million parameters"
        if self.is_adopted:
            training = ""
            if self.trained_cards:
                training = f", trained further for {minutes:.1f} minutes on {machine_text(self.card.machine)}"
            return f"{source_names}, a pretrained model with {size}{training}."
        kind = "chat model" if len(self.cards) > 1 else "language model"
        training = f"trained on {source_names} in {minutes:.1f} minutes on {machine_text(base.machine)}"
        return f"A {kind} with {size}, {training}."

    def baseline_sentence(self) -> str:
        """What the bits per byte are to be compared with."""
        if self.is_adopted:
            return "The held-out text may have been in the model's pretraining data."
        bpb = self.cards[0].figures["kneser_ney_bpb"]
        return f"A 6-gram baseline over bytes (Kneser-Ney) reaches {bpb:.3f} bits per byte."

    def training_rows(self) -> list[tuple[str, ...]]:
        """A row of TRAINING_COLUMNS for each stage."""
        rows = []
        for card in self.trained_cards:
            figures = card.figures
            tokens, seconds = figures["tokens"], figures["seconds"]
            pflop = 0.0
            if figures["tokens_per_second"]:
                pflop = figures["flops_per_second"] / figures["tokens_per_second"] * tokens / 1e15
            rows.append(
                (
                    STAGE_TITLES[card.stage],
                    card.name,
                    f"{card.steps:,}",
                    f"{tokens:,}",
                    f"{seconds:.0f}",
                    f"{tokens / max(seconds, 0.1):,.0f}",
                    f"{pflop:.4f}",
                )
            )
        return rows

    def evaluation_table(self) -> tuple[list[str], list[EvaluationRow]]:
        """(a column title for each evaluated stage, rows): bits per byte, and the accuracy on each task."""
        evaluations = list(self.evaluations.values())
        if not evaluations:
            return [], []
        bpbs = [evaluation["bpb"] for evaluation in evaluations]
        rows = [
            EvaluationRow("held-out text, bits per byte", [f"{bpb:.3f}" for bpb in bpbs], bpbs.index(min(bpbs))),
        ]
        for task, first_result in evaluations[0]["tasks"].items():
            results = [evaluation["tasks"].get(task) for evaluation in evaluations]
            if all(results):
                cells = [f"{r['accuracy']:.1%} ({r['low']:.0%} to {r['high']:.0%})" for r in results]
                accuracies = [r["accuracy"] for r in results]
                rows.append(EvaluationRow(first_result["label"], cells, accuracies.index(max(accuracies))))
        return [STAGE_TITLES[stage] for stage in self.evaluations], rows

    def details(self) -> list[tuple[str, str]]:
        """Rows (name, value): what is needed to repeat the run."""
        base = self.cards[0]
        machine = base.machine
        depth = base.depth_reason or "as adopted"
        rows = [("finished", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.card.finished)))]
        for card in self.cards:
            if card is self.card or card.command != self.card.command:  # all stages of a speedrun have one command
                rows.append(("command", card.command))
        rows += [
            ("seed", str(base.seed)),
            ("architecture", f"{base.arch}: {depth}; vocabulary of {base.vocab_size:,} tokens"),
            ("parameters", ", ".join(f"{n / 1e6:.2f}M {kind}" for kind, n in base.parameter_counts.items())),
        ]
        for adapter in self.card.adapters:
            text = f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, on {', '.join(adapter['targets'])}"
            rows.append(("LoRA adapter", f"{adapter['parameters'] / 1e6:.2f}M parameters: {text}"))
        if base.compile:
            rows.append(("torch.compile", f"{'on' if base.compile['on'] else 'off'}: {base.compile['reason']}"))
        hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB"
        rows += [
            ("machine", f"{hardware}, {machine['dtype']}, {machine['threads']} threads"),
            ("versions", ", ".join(f"{name} {version}" for name, version in base.versions.items())),
        ]
        for source in base.data:
            name = "pretrained model" if self.is_adopted else "text"
            rows.append((name, f"{source['name']} ({source['license']}): {source['attribution']}"))
        return rows

    def memorization_sentence(self) -> str:
        """The longest passage that the model recites (`evaluate.longest_memorized_passage`)."""
        text = "the plays" if self.is_adopted else "its training text"
        passage = self.last_evaluation()["memorized"]
        source = f" ({passage['source']})" if passage["source"] else ""
        return (
            f"Prompted with 16 tokens from each of 64 places in {text}, the model continues verbatim for at most"
            f" {passage['characters']} characters{source}: “{passage['text'].strip()}”"
        )

    def charts(self) -> list[str]:
        """Training curves of every stage, as SVG."""
        pretrain, rl = self.events.get("pretrain", []), self.events.get("rl", [])
        charts = [line_chart("pretraining: loss, nats per token", {"loss": curve(pretrain, "loss", 9)}, "step")]
        if not self.is_adopted:
            validation = [(e["step"], e["validation_bpb"]) for e in pretrain if "validation_bpb" in e]
            baseline = ("6-gram baseline (Kneser-Ney)", self.cards[0].figures["kneser_ney_bpb"])
            charts.append(line_chart("validation: bits per byte", {"bpb": validation}, "step", level=baseline))
        for stage, title in (("sft", "SFT: loss on answers"), ("distill", "distillation: loss")):
            charts.append(line_chart(title, {"loss": curve(self.events.get(stage, []), "loss", 15)}, "step"))
        keys = sorted({key for event in rl for key in event if key.startswith("pass_rate_")})
        pass_rates = {key.removeprefix("pass_rate_"): curve(rl, key, 5) for key in keys}
        charts.append(line_chart("RL: pass rate", pass_rates, "step", percent=True))
        charts.append(line_chart("RL: entropy, nats per token", {"entropy": curve(rl, "entropy", 5)}, "step"))
        charts.append(line_chart("RL: response length, tokens", {"length": curve(rl, "length", 5)}, "step"))
        return [chart for chart in charts if chart]


def machine_text(machine: dict) -> str:
    return f"{machine['cores']} cores ({machine['cpu']}, {machine['dtype']})"


def curve(events: list[dict], key: str, window: int) -> list[tuple[float, float]]:
    """The running median of a figure over the steps."""
    return running_median([(event["step"], event[key]) for event in events if key in event], window)


def report_data(folder: ModelFolder) -> ReportData:
    """The contents of the report of a finished model."""
    events: dict[str, list[dict]] = {}
    for event in folder.events:
        events.setdefault(event["stage"], []).append(event)
    return ReportData(folder.card.lineage(), events)


def printable(text: str) -> str:
    """The text without control characters (terminals obey them), lone surrogates, and changes of the text direction.

    What models generate and what users name their files is not trusted.
    """

    def is_hidden(character: str) -> bool:
        return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character != "\n"

    return "".join("\ufffd" if is_hidden(character) else character for character in text)
