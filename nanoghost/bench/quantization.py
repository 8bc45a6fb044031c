"""`nanoghost bench quantization`: the quality of quantized weights, in bits per byte of the validation plays."""

import json
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.bench.harness import validation_texts
from nanoghost.commands.arguments import ModelArgument
from nanoghost.engine.quantized_llama import quantize_model, supports_quantization
from nanoghost.errors import UserError
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.formats.model_folder import load_model
from nanoghost.home import open_model
from nanoghost.progress import JsonFlag

MAX_WINDOW = 512  # tokens of context


@dataclass(frozen=True)
class QuantizationSettings(ModelArgument, JsonFlag):
    tokens: int = 4096
    """Length of the text to evaluate."""


def command(settings: QuantizationSettings) -> None:
    hardware.prepare()
    folder = open_model(settings.model)
    model, tokenizer = load_model(folder.path, torch.float32)
    if not supports_quantization(model.config):
        raise UserError(f"'{folder.name}' is not quantized on this machine: it runs in PyTorch")
    [tokens] = validation_texts(tokenizer, 1, settings.tokens)
    text_bytes = len(tokenizer.decode(tokens[1:]).encode())  # the first token is not predicted
    window = min(MAX_WINDOW, model.config.context)
    fp32_bpb = bits_per_byte(model, tokens, window, text_bytes)
    fp32_megabytes = 4 * sum(model.parameter_counts().values()) / 1e6
    rows = [{"weights": "fp32", "bpb": fp32_bpb, "megabytes": fp32_megabytes, "increase": 0.0}]
    for bits in (16, 8, 4, None):
        quantized = quantize_model(model, bits)
        bpb = bits_per_byte(quantized, tokens, window, text_bytes)
        name = f"{bits} bits" if bits else "auto (as in chat)"
        megabytes = quantized.weight_bytes() / 1e6
        rows.append({"weights": name, "bpb": bpb, "megabytes": megabytes, "increase": bpb / fp32_bpb - 1})
    table = Table("weights")
    for column in ("MB", "bits per byte", "increase"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["weights"], f"{row['megabytes']:.0f}", f"{row['bpb']:.4f}", f"{row['increase']:+.2%}")
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps({"rows": rows}))
