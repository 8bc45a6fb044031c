"""The verbs. Each command's module is imported only when it runs, so `nanoghost --help` answers at once."""

import contextlib
import importlib
import io
import os
import re
import sys

from nanoghost import __version__
from nanoghost.errors import UserError

# verb: (module, settings class, function, what it does)
VERBS = {
    "speedrun": ("speedrun", "SpeedrunSettings", "command", "the whole pipeline: from an empty folder to a chat"),
    "chat": ("serve.terminal", "ChatSettings", "command", "talk to a model"),
    "serve": (
        "serve.server",
        "ServeSettings",
        "command",
        "a chat page and an API for other programs, on this computer",
    ),
    "report": ("evals.report", "ReportSettings", "command", "what was made, how, and how good it is"),
    "data": ("commands.data", "DataSettings", "command", "fetch, check and tokenize text"),
    "data refine": (
        "data.refine",
        "RefineSettings",
        "command",
        "leave out copies, near copies, junk and what models are examined on",
    ),
    "tokenizer train": ("commands.tokenizer", "TrainSettings", "train_command", "learn a vocabulary from text"),
    "tokenizer eval": ("commands.tokenizer", "EvalSettings", "eval_command", "bytes per token by kind of text"),
    "pretrain": ("train.pretrain", "PretrainSettings", "command", "learn to continue text"),
    "sft": ("train.sft", "SftSettings", "command", "learn to answer, from conversations"),
    "rl": ("train.rl", "RlSettings", "command", "learn from attempts at problems that can be checked"),
    "distill": ("train.distill", "DistillSettings", "command", "learn what another model answers, or expects"),
    "eval": ("evals.evaluate", "EvalSettings", "command", "bits per byte and accuracy on held-out problems"),
    "adopt": ("commands.adopt", "AdoptSettings", "command", "take in a model that others trained"),
    "export": ("commands.export", "ExportSettings", "command", "write a model as a GGUF file"),
    "list": ("commands.models", "ListSettings", "list_command", "models in the home folder"),
    "show": ("commands.models", "ShowSettings", "show_command", "a model's card"),
    "rename": ("commands.models", "RenameSettings", "rename_command", "give a model another name"),
    "rm": ("commands.models", "RemoveSettings", "remove_command", "remove a model"),
    "sleep": (
        "memory.sleep_command",
        "SleepSettings",
        "command",
        "train what a person wrote into an adapter of the model",
    ),
    "memory": ("memory.memory_command", "MemorySettings", "command", "show and change the facts stored about a person"),
    "lab sleep": (
        "lab.sleep",
        "LabSleepSettings",
        "command",
        "what a model remembers after sleeping, against baselines",
    ),
    "lab ledger": ("lab.ablations", "LedgerSettings", "command", "what each part of the recipe is worth, in seconds"),
    "lab extraction": (
        "lab.fact_extraction",
        "LabExtractionSettings",
        "command",
        "precision and recall of fact extraction",
    ),
    "lab dial": ("lab.depth_sweep", "DialSettings", "command", "whether the dial chooses well"),
    "lab race": ("lab.baselines", "RaceSettings", "command", "other people's small trainers beside ours"),
    "lab lecun1989": (
        "lab.lecun1989",
        "Lecun1989Settings",
        "command",
        "a network of 1989, brought to the present step by step",
    ),
    "bench decode": (
        "bench.decode",
        "DecodeSettings",
        "decode",
        "how fast a model writes here, beside what is possible",
    ),
    "bench prefill": ("bench.decode", "PrefillSettings", "prefill", "how fast it reads"),
    "bench pretrain": (
        "bench.pretrain",
        "PretrainBenchSettings",
        "command",
        "how fast a model is trained from nothing, by size and batch",
    ),
    "bench train": ("bench.train", "TrainSettings", "train", "how fast it is finetuned"),
    "bench rl": ("bench.rl", "RlBenchSettings", "command", "how fast it practises"),
    "bench serve": ("bench.serve", "ServeBenchSettings", "command", "what HTTP costs beside the engine alone"),
    "bench load": ("bench.load", "LoadSettings", "command", "many clients at once, some of them bad"),
    "bench packing": ("bench.decode", "PackingSettings", "packing", "what it costs to speak in fewer bits"),
    "bench refine": (
        "bench.refine",
        "RefineBenchSettings",
        "command",
        "what the refinery finds, and what memory it takes",
    ),
    "plan": ("commands.plan", "PlanSettings", "command", "what a pretraining run takes: time, memory, money"),
    "doctor": ("commands.doctor", "DoctorSettings", "command", "what this computer does well"),
}

EXAMPLES = {
    "speedrun": "nanoghost speedrun\n  nanoghost speedrun --minutes 2",
    "chat": "nanoghost chat\n  nanoghost chat ghost --prompt 'What is 12 + 345?'\n  nanoghost chat ghost --documents ./notes",
    "serve": "nanoghost serve\n  nanoghost serve smollm2 --documents ./notes\n"
    "  nanoghost serve --host 0.0.0.0 --api-key-file key.txt --allow-host ghost.example.org",
    "report": "nanoghost report\n  nanoghost report ghost-base --json",
    "data": "nanoghost data plays\n  nanoghost data ./my_notes",
    "data refine": "nanoghost data refine ./crawl --name clean\n  nanoghost data refine ./crawl --name clean --similarity 0.7 --decontaminate none",
    "tokenizer train": "nanoghost tokenizer train --data plays --vocab-size 4096",
    "tokenizer eval": "nanoghost tokenizer eval",
    "pretrain": "nanoghost pretrain --data ./my_notes --name mine --minutes 5\n  nanoghost pretrain --depth 2 --steps 100",
    "sft": "nanoghost sft mine --name mine-sft\n  nanoghost sft mine --name mine-sft --data chats.jsonl --minutes 2\n"
    "  nanoghost sft mine --name mine-tools --data tools",
    "rl": "nanoghost rl ghost-sft --name ghost\n  nanoghost rl ghost-sft --name other --variant dr_grpo --tasks chain_sum",
    "distill": "nanoghost distill ghost-base --teacher ghost --name pupil\n"
    "  nanoghost distill nano --teacher smollm2 --name pupil --kind token --data plays --context 256",
    "eval": "nanoghost eval ghost\n  nanoghost eval ghost --problems 500 --json",
    "adopt": "nanoghost adopt smollm2\n  nanoghost adopt ./SmolLM2-360M-Instruct --name smol\n  nanoghost adopt Qwen/Qwen3-0.6B",
    "export": "nanoghost export smollm2 --gguf\n  nanoghost export smollm2 --gguf --quant q8_0 --out smollm2.gguf",
    "list": "nanoghost list",
    "show": "nanoghost show ghost",
    "rename": "nanoghost rename ghost old-ghost",
    "rm": "nanoghost rm old-ghost",
    "sleep": "nanoghost sleep --person me\n  nanoghost sleep --person me --dry-run\n  nanoghost sleep --person me --log",
    "memory": "nanoghost memory --person me --search sister\n  nanoghost memory --person me --correct 3 Rex\n"
    "  nanoghost memory --person me --forget 3",
    "lab sleep": "nanoghost lab sleep\n  nanoghost lab sleep --split test --arms base,sleep --json",
    "lab ledger": "nanoghost lab ledger\n  nanoghost lab ledger --rungs muon,pairs --seeds 1",
    "lab extraction": "nanoghost lab extraction",
    "lab dial": "nanoghost lab dial --minutes 1,4\n  nanoghost lab dial --minutes 10 --choices 4x4096,6x4096",
    "lab race": "nanoghost lab race --nanochat ../nanochat --nanogpt ../nanoGPT --out race.svg",
    "lab lecun1989": "nanoghost lab lecun1989\n  nanoghost lab lecun1989 --rungs 1989,dropout --seeds 1",
    "bench decode": "nanoghost bench decode smollm2\n  nanoghost bench decode smollm2 --against llama.cpp,transformers --json",
    "bench prefill": "nanoghost bench prefill smollm2 --tokens 512",
    "bench pretrain": "nanoghost bench pretrain\n  nanoghost bench pretrain --depths 4 --batches 8,16,32 --json",
    "bench train": "nanoghost bench train smollm2 --lora 8\n  nanoghost bench train smollm2 --against transformers --json",
    "bench rl": "nanoghost bench rl smollm2\n  nanoghost bench rl smollm2 --against trl --json",
    "bench serve": "nanoghost bench serve smollm2 --streams 1,16",
    "bench load": "nanoghost bench load smollm2 --clients 32 --minutes 5",
    "bench packing": "nanoghost bench packing smollm2",
    "bench refine": "nanoghost bench refine --megabytes 10,100 --kills 3",
    "plan": "nanoghost plan --depth 24 --hardware 8xH100\n  nanoghost plan --minutes 10 --json",
    "doctor": "nanoghost doctor\n  nanoghost doctor --json",
}


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {row[3]}" for verb, row in VERBS.items())
    return f"""nanoghost {__version__}: make a chat model of your own, and understand all of it

usage: nanoghost VERB [options]

{verbs}

`nanoghost VERB --help` explains a verb. Models live in $NANOGHOST_HOME (default ~/.nanoghost)."""


def parse(settings_class, verb: str, words: list[str]):
    """Settings from the command line; tyro's boxes become one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                settings_class,
                prog=f"nanoghost {verb}",
                args=words,
                config=(tyro.conf.FlagCreatePairsOff,),
                description=f"{VERBS[verb][3]}\n\nExamples:\n  {EXAMPLES[verb]}",
            )
    except SystemExit as e:
        if not e.code:  # --help
            raise
        raise UserError(f"{complaint(said.getvalue())} (see `nanoghost {verb} --help`)") from None


def complaint(box: str) -> str:
    """The sentence inside one of tyro's error boxes."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", line).strip() for line in box.splitlines()]
    body = [line for line in lines[1:] if line]  # the first is the title
    end = next((i for i, line in enumerate(body) if line.startswith(("Argument helptext", "For full helptext"))), None)
    text = re.sub(
        r"no type matching .* could be instantiated from \['?(.*?)'?\]\..*", r"'\1' does not fit", " ".join(body[:end])
    )
    return text[:300]


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] == "--version":
        print(__version__)
        return
    try:
        run(words)
    except UserError as e:
        if os.environ.get("NANOGHOST_DEBUG"):
            raise
        print(f"nanoghost: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if os.environ.get("NANOGHOST_DEBUG") or e.errno is None:
            raise
        where = f": {e.filename}" if e.filename else ""
        print(f"nanoghost: {e.strerror}{where}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        from nanoghost.errors import Stopped

        saved = isinstance(e, Stopped)
        print(
            "\nnanoghost: stopped; the same command goes on where it was" if saved else "\nnanoghost: stopped",
            file=sys.stderr,
        )
        sys.exit(0 if saved else 130)


def run(words: list[str]) -> None:
    verb = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    if verb not in VERBS:
        raise UserError(f"'{verb}' is not a verb; `nanoghost --help` lists them")
    module_name, settings_name, function, _ = VERBS[verb]
    module = importlib.import_module(f"nanoghost.{module_name}")
    settings = parse(getattr(module, settings_name), verb, words[len(verb.split()) :])
    getattr(module, function)(settings)
