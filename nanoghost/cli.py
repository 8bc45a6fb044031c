"""The command line: one table of commands, and a parser that makes a settings dataclass from the arguments.

A command's module is imported only when the command runs: `nanoghost --help` needs neither torch nor tyro.
"""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from nanoghost import __version__
from nanoghost.errors import Stopped, StopSignals, UserError

MAX_ERROR = 300  # characters of an error of the argument parser


@dataclass(frozen=True)
class Command:
    module: str
    """Module below `nanoghost` that has the function."""
    settings: str
    """Name of the settings dataclass, after its module if that is another one; each field is a flag or an argument."""
    function: str
    """Name of the function to call with the settings."""
    summary: str
    """One line for `nanoghost --help`."""
    examples: tuple[str, ...]
    """Command lines for the command's own --help."""


GROUPS = {
    "Pipeline": {
        "speedrun": Command(
            "speedrun", "SpeedrunSettings", "command",
            "run the whole pipeline: tokenizer, pretraining, SFT, RL, evaluation, report",
            ("nanoghost speedrun", "nanoghost speedrun --minutes 2"),
        ),
        "data": Command(
            "commands.data", "DataSettings", "command",
            "download, check and tokenize training text",
            ("nanoghost data plays", "nanoghost data ./my_notes"),
        ),
        "data refine": Command(
            "data.refine", "data.refine_settings.RefineSettings", "command",
            "deduplicate, filter and decontaminate training text",
            (
                "nanoghost data refine ./crawl --name clean",
                "nanoghost data refine ./crawl --name clean --similarity 0.7 --decontaminate none",
            ),
        ),
        "tokenizer train": Command(
            "commands.tokenizer", "TokenizerTrainSettings", "train_command",
            "train a byte-level BPE tokenizer",
            ("nanoghost tokenizer train --data plays --vocab-size 4096",),
        ),
        "tokenizer eval": Command(
            "commands.tokenizer", "TokenizerEvalSettings", "eval_command",
            "measure a tokenizer's bytes per token on several kinds of text",
            ("nanoghost tokenizer eval",),
        ),
        "pretrain": Command(
            "train.pretrain", "PretrainSettings", "command",
            "pretrain a base model on text",
            (
                "nanoghost pretrain --data ./my_notes --name mine --minutes 5",
                "nanoghost pretrain --depth 2 --steps 100",
            ),
        ),
        "sft": Command(
            "train.sft", "SftSettings", "command",
            "supervised fine-tuning (SFT) on conversations",
            (
                "nanoghost sft mine --name mine-sft",
                "nanoghost sft mine --name mine-sft --data chats.jsonl --minutes 2",
                "nanoghost sft mine --name mine-tools --data tools",
            ),
        ),
        "rl": Command(
            "train.rl", "RlSettings", "command",
            "reinforcement learning (RL) with verifiable rewards",
            (
                "nanoghost rl ghost-sft --name ghost",
                "nanoghost rl ghost-sft --name other --variant dr_grpo --tasks chain_sum",
            ),
        ),
        "distill": Command(
            "train.distill", "DistillSettings", "command",
            "knowledge distillation from a teacher model (answers, tokens or on-policy)",
            (
                "nanoghost distill ghost-base --teacher ghost --name student",
                "nanoghost distill nano --teacher smollm2 --name student --kind token --data plays --context 256",
            ),
        ),
        "eval": Command(
            "commands.evaluate", "EvalSettings", "command",
            "evaluate a model: bits per byte, and accuracy on held-out problems",
            ("nanoghost eval ghost", "nanoghost eval ghost --problems 500 --json"),
        ),
        "report": Command(
            "commands.report", "ReportSettings", "command",
            "write a report: how a model was trained and how it scores",
            ("nanoghost report", "nanoghost report ghost-base --json"),
        ),
    },
    "Chat": {
        "chat": Command(
            "serve.terminal", "ChatSettings", "command",
            "chat with a model in the terminal",
            (
                "nanoghost chat",
                "nanoghost chat ghost --prompt 'What is 12 + 345?'",
                "nanoghost chat ghost --documents ./notes",
            ),
        ),
        "serve": Command(
            "serve.server", "ServeSettings", "command",
            "serve a chat page and an OpenAI-compatible API",
            (
                "nanoghost serve",
                "nanoghost serve smollm2 --documents ./notes",
                "nanoghost serve --host 0.0.0.0 --api-key-file key.txt --allow-host ghost.example.org",
            ),
        ),
    },
    "Models": {
        "adopt": Command(
            "commands.adopt", "AdoptSettings", "command",
            "import a model (Hugging Face folder or name, GGUF file)",
            (
                "nanoghost adopt smollm2",
                "nanoghost adopt ./SmolLM2-360M-Instruct --name smol",
                "nanoghost adopt Qwen/Qwen3-0.6B",
            ),
        ),
        "export": Command(
            "commands.export", "ExportSettings", "command",
            "export a model as a GGUF file",
            ("nanoghost export smollm2", "nanoghost export smollm2 --quant q8_0 --out smollm2.gguf"),
        ),
        "list": Command(
            "commands.models", "ListSettings", "list_command",
            "list the models of the home folder",
            ("nanoghost list",),
        ),
        "show": Command(
            "commands.models", "ShowSettings", "show_command",
            "show a model's card",
            ("nanoghost show ghost",),
        ),
        "rename": Command(
            "commands.models", "RenameSettings", "rename_command",
            "rename a model",
            ("nanoghost rename ghost old-ghost",),
        ),
        "rm": Command(
            "commands.models", "RemoveSettings", "remove_command",
            "delete a model",
            ("nanoghost rm old-ghost",),
        ),
        "plan": Command(
            "commands.plan", "PlanSettings", "command",
            "estimate time, memory and cost of a pretraining run",
            ("nanoghost plan --depth 24 --hardware 8xH100", "nanoghost plan --minutes 10 --json"),
        ),
        "doctor": Command(
            "commands.doctor", "DoctorSettings", "command",
            "check this computer: CPU, memory, compiler, matmul speed",
            ("nanoghost doctor", "nanoghost doctor --json"),
        ),
    },
    "Memory": {
        "sleep": Command(
            "memory.sleep_command", "SleepSettings", "command",
            "train a LoRA adapter on what a user has told the model",
            (
                "nanoghost sleep --person me",
                "nanoghost sleep --person me --dry-run",
                "nanoghost sleep --person me --log",
            ),
        ),
        "memory": Command(
            "memory.memory_command", "MemorySettings", "command",
            "show, correct and delete the facts stored about a user",
            (
                "nanoghost memory --person me --search sister",
                "nanoghost memory --person me --correct 3 Rex",
                "nanoghost memory --person me --forget 3",
            ),
        ),
    },
    "Lab (experiments)": {
        "lab ledger": Command(
            "lab.ablations", "LedgerSettings", "command",
            "ablations of the pretraining recipe: the training time that each part saves",
            ("nanoghost lab ledger", "nanoghost lab ledger --recipes muon,bigram --seeds 1"),
        ),
        "lab dial": Command(
            "lab.depth_sweep", "DialSettings", "command",
            "check the dial: which depth is best for which training time",
            ("nanoghost lab dial --minutes 1,4", "nanoghost lab dial --minutes 10 --choices 4x4096,6x4096"),
        ),
        "lab baselines": Command(
            "lab.baselines", "BaselinesSettings", "command",
            "compare pretraining with nanochat and nanoGPT",
            ("nanoghost lab baselines --nanochat ../nanochat --nanogpt ../nanoGPT --out baselines.svg",),
        ),
        "lab lecun1989": Command(
            "lab.lecun1989", "Lecun1989Settings", "command",
            "the digit network of LeCun et al. (1989), modernized step by step",
            ("nanoghost lab lecun1989", "nanoghost lab lecun1989 --recipes 1989,dropout --seeds 1"),
        ),
        "lab sleep": Command(
            "lab.sleep", "LabSleepSettings", "command",
            "what a model remembers after sleep, compared with baselines",
            ("nanoghost lab sleep", "nanoghost lab sleep --split test --arms base,sleep --json"),
        ),
        "lab extraction": Command(
            "lab.fact_extraction", "LabExtractionSettings", "command",
            "precision and recall of fact extraction",
            ("nanoghost lab extraction",),
        ),
    },
    "Benchmarks": {
        "bench decode": Command(
            "bench.decode", "DecodeSettings", "decode",
            "decoding speed, compared with the memory bandwidth limit",
            (
                "nanoghost bench decode smollm2",
                "nanoghost bench decode smollm2 --against llama.cpp,transformers --json",
            ),
        ),
        "bench prefill": Command(
            "bench.decode", "PrefillSettings", "prefill",
            "prefill speed",
            ("nanoghost bench prefill smollm2 --tokens 512",),
        ),
        "bench quantization": Command(
            "bench.quantization", "QuantizationSettings", "command",
            "quality at 4, 8 and 16 bits",
            ("nanoghost bench quantization smollm2",),
        ),
        "bench pretrain": Command(
            "bench.pretrain", "PretrainBenchSettings", "command",
            "pretraining speed by depth and batch size",
            ("nanoghost bench pretrain", "nanoghost bench pretrain --depths 4 --batches 8,16,32 --json"),
        ),
        "bench train": Command(
            "bench.train", "TrainBenchSettings", "command",
            "fine-tuning speed",
            ("nanoghost bench train smollm2 --lora 8", "nanoghost bench train smollm2 --against transformers --json"),
        ),
        "bench rl": Command(
            "bench.rl", "RlBenchSettings", "command",
            "speed of RL rollouts and training",
            ("nanoghost bench rl smollm2", "nanoghost bench rl smollm2 --against trl --json"),
        ),
        "bench serve": Command(
            "bench.serve", "ServeBenchSettings", "command",
            "overhead of the HTTP server compared with the engine alone",
            ("nanoghost bench serve smollm2 --streams 1,16",),
        ),
        "bench load": Command(
            "bench.load", "LoadSettings", "command",
            "load test with many clients, some of them misbehaving",
            ("nanoghost bench load smollm2 --clients 32 --minutes 5",),
        ),
        "bench refine": Command(
            "bench.refine", "RefineBenchSettings", "command",
            "speed, memory and recall of `data refine`",
            ("nanoghost bench refine --megabytes 10,100 --kills 3",),
        ),
    },
}  # fmt: skip
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def usage() -> str:
    width = max(map(len, COMMANDS))
    sections = []
    for title, group in GROUPS.items():
        lines = [f"  {name:<{width}}  {command.summary}" for name, command in group.items()]
        sections.append("\n".join([f"{title}:", *lines]))
    commands = "\n\n".join(sections)
    return f"""nanoghost {__version__}: train a small chat model on your own computer, and understand every part of it

usage: nanoghost COMMAND [options]

{commands}

`nanoghost COMMAND --help` explains a command. Models are stored in $NANOGHOST_HOME (default: ~/.nanoghost)."""


def command_name(arguments: list[str]) -> str:
    """The command at the head of the arguments: one word or two. Raises UserError if there is no such command."""
    two_words = " ".join(arguments[:2])
    name = two_words if two_words in COMMANDS else arguments[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'; `nanoghost --help` lists all commands")
    return name


def load_settings(name: str) -> type:
    """The settings dataclass of a command."""
    module, _, settings = COMMANDS[name].settings.rpartition(".")
    return getattr(importlib.import_module(f"nanoghost.{module or COMMANDS[name].module}"), settings)


def load_function(name: str) -> Callable:
    return getattr(importlib.import_module(f"nanoghost.{COMMANDS[name].module}"), COMMANDS[name].function)


def parse(settings_class: type, name: str, arguments: list[str]):
    """The settings of a command from its arguments. Raises UserError with one line instead of tyro's error box."""
    import tyro

    errors = io.StringIO()
    examples = "\n".join(f"  {example}" for example in COMMANDS[name].examples)
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                settings_class,
                prog=f"nanoghost {name}",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
                description=f"{COMMANDS[name].summary}\n\nExamples:\n{examples}",
            )
    except SystemExit as e:
        if e.code != 2:  # --help, or SIGTERM
            raise
        raise UserError(f"{error_text(errors.getvalue())} (see `nanoghost {name} --help`)") from None


def error_text(error_box: str) -> str:
    """The message inside one of tyro's error boxes, without its frame, its title and its hints."""
    frame_and_colors = r"\x1b\[[0-9;]*m|[│╭╮╰╯─]"
    lines = [re.sub(frame_and_colors, " ", line).strip() for line in error_box.split("\n")]
    message_lines = []
    for line in lines[1:]:  # the first line is the title
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        message_lines.append(line)
    message = " ".join(line for line in message_lines if line)
    invalid_value = r"no type matching .* could be instantiated from \['?(.*?)'?\]\..*"
    return re.sub(invalid_value, r"invalid value '\1'", message)[:MAX_ERROR]


def run(arguments: list[str]) -> None:
    name = command_name(arguments)
    settings = parse(load_settings(name), name, arguments[len(name.split()) :])
    load_function(name)(settings)


def main(arguments: list[str] | None = None) -> None:
    """Run a command. A UserError is one line on standard error and exit code 2; NANOGHOST_DEBUG=1 shows tracebacks."""
    arguments = sys.argv[1:] if arguments is None else arguments
    prepare_terminal()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    debug = bool(os.environ.get("NANOGHOST_DEBUG"))
    try:
        with StopSignals():
            run(arguments)
    except UserError as e:
        if debug:
            raise
        fail(str(e), 2)
    except OSError as e:
        if debug or e.errno is None:  # without a number it is an error of a library, not of the operating system
            raise
        fail(f"{e.strerror}: {e.filename}" if e.filename else str(e.strerror), 2)
    except Stopped:
        print(file=sys.stderr)  # end the line on which the terminal shows ^C
        fail("stopped; rerun the same command to resume", 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        fail("stopped", 130)


def prepare_terminal() -> None:
    """Characters that the terminal's encoding lacks become "?", and NO_COLOR stands for no escape codes at all."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"  # what rich and we respect; NO_COLOR alone leaves rich its bold text


def fail(message: str, exit_code: int) -> None:
    print(f"nanoghost: {message}", file=sys.stderr)
    sys.exit(exit_code)
