"""`nanoghost report`: write the report of a model (evals/report.py)."""

import json
from dataclasses import dataclass

from rich.console import Console

from nanoghost.commands.arguments import ModelArgument
from nanoghost.evals.report import print_report, write_report
from nanoghost.evals.report_data import report_data
from nanoghost.home import open_model
from nanoghost.progress import JsonFlag


@dataclass(frozen=True)
class ReportSettings(ModelArgument, JsonFlag):
    pass


def command(settings: ReportSettings) -> None:
    folder = open_model(settings.model)
    path = write_report(folder)
    print_report(folder)
    Console(stderr=True).print(f"\n{path}", highlight=False, markup=False, soft_wrap=True)
    if settings.json:
        data = report_data(folder)
        evaluations = {}
        for stage, event in data.evaluations.items():
            evaluations[stage] = {key: event[key] for key in ("bpb", "tasks", "memorized")}
        figures = {card.stage: card.figures for card in data.cards}
        print(json.dumps({"name": data.card.name, "figures": figures, "evaluations": evaluations}))
