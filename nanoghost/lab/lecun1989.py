"""`nanoghost lab lecun1989`: a network of 1989 reads handwritten digits, and is brought to the present a change at a time.

LeCun et al., "Backpropagation Applied to Handwritten Zip Code Recognition" (1989): 9,760 weights, tanh, squared error, one
digit a step. What is not in the paper is guessed: which 8 of 12 maps a map of the second layer sees (its own and the next
seven), and that its weights begin within 2.4 over the root of what a unit reads (without the root, nine in ten digits are
wrong after a pass). Then, each on top of the ones before (after Karpathy 2022, "33 years from now"): a softmax and
cross-entropy; Adam, batches of 16 and more passes; digits moved by a pixel; ReLU and dropout. Then the last is taken apart
again: each change left out alone; twice the passes, twice the maps, half the digits.

All networks of a rung, one for each fifth of the digits that is held out and each seed, learn at once: they are stacked as
one batch of matrix products.

R networks, B digits, C maps.
"""

import gzip
import importlib.util
import json
import math
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.commands.arguments import select_names
from nanoghost.errors import UserError
from nanoghost.evals.svg import bar_charts
from nanoghost.home import home, read_json, write_atomic, write_json
from nanoghost.progress import Display

FOLDS = 5


@dataclass(frozen=True)
class Rung:
    """One way to build and teach the network."""

    loss: str = "squared"
    """squared (to +-1) or softmax."""
    optimizer: str = "sgd"
    """sgd or adam, whose rate falls to 0."""
    batch: int = 1
    passes: int = 23
    moved: bool = False
    """Each digit is moved by up to a pixel each time."""
    relu: bool = False
    """Instead of tanh; and a quarter of what the third layer reads is dropped while learning."""
    maps: int = 12
    """Of the first two layers."""
    digits: float = 1.0
    """Share of those to learn from."""


LADDER = {
    "1989": {},
    "+ softmax": {"loss": "softmax"},
    "+ Adam, batches, 60 passes": {"optimizer": "adam", "batch": 16, "passes": 60},
    "+ moved by a pixel": {"moved": True},
    "+ ReLU, dropout": {"relu": True},
}
LEFT_OUT = {
    "without softmax": {"loss": "squared"},
    "without Adam, batches, passes": {"optimizer": "sgd", "batch": 1, "passes": 23},
    "without moving": {"moved": False},
    "without ReLU, dropout": {"relu": False},
    "twice the passes": {"passes": 120},
    "twice the maps": {"maps": 24},
    "half the digits": {"digits": 0.5},
}
RATES = {"sgd": (0.01, 0.03, 0.1), "adam": (3e-4, 1e-3, 3e-3)}


def rungs() -> dict[str, Rung]:
    found, settings = {}, {}
    for name, change in LADDER.items():
        settings |= change
        found[name] = Rung(**settings)
    return found | {name: replace(Rung(**settings), **change) for name, change in LEFT_OUT.items()}


# ── the network, R times ────────────────────────────────────────────────────────────────────────────────────────────


class Networks:
    """R networks of one form; `forward` reads (R, B, 16, 16), with values from -1 to 1, and says (R, B, 10)."""

    def __init__(self, count: int, rung: Rung, seeds: list[int]):
        C = rung.maps
        shapes = {  # and what each unit reads
            "h1": ((C, 1, 5, 5), 25), "h1_bias": ((C, 8, 8), 0), "h2": ((C, C, 5, 5), 25 * (C * 2 // 3)), "h2_bias": ((C, 4, 4), 0),
            "h3": ((30, C * 16), C * 16), "h3_bias": ((30,), 0), "out": ((10, 30), 30), "out_bias": ((10,), 0),
        }  # fmt: skip
        self.count, self.rung, self.parameters = count, rung, {}
        for name, (shape, reads) in shapes.items():
            each = []
            for seed in seeds:
                generator = torch.Generator().manual_seed(seed)
                each.append(
                    torch.empty(shape).uniform_(-1, 1, generator=generator) * (2.4 / reads**0.5)
                    if reads
                    else torch.zeros(shape)
                )
            self.parameters[name] = torch.stack(each).requires_grad_()
        maps = torch.arange(C)
        self.sees = ((maps - maps[:, None]) % C < C * 2 // 3).float()[None, :, :, None, None]  # of 12 maps 8

    def weights(self) -> int:
        """Of one network."""
        C = self.rung.maps
        unseen = C * (C - C * 2 // 3) * 25
        return sum(p[0].numel() for p in self.parameters.values()) - unseen

    def forward(self, x_RBHW, learning: bool = False):
        R, C, p = self.count, self.rung.maps, self.parameters
        act = torch.relu if self.rung.relu else torch.tanh

        def layer(x_RBCHW, weight, bias):
            """5 x 5 patches, every second one; beyond the edge is background."""
            side = x_RBCHW.size(-1) // 2
            patches = F.unfold(F.pad(x_RBCHW.flatten(0, 1), (2, 2, 2, 2), value=-1.0), 5, stride=2)
            patches = patches.view(R, -1, *patches.shape[1:]).transpose(2, 3).flatten(1, 2)
            y = torch.bmm(patches, weight.flatten(2).mT).view(R, -1, side * side, C).transpose(2, 3)
            return act(y + bias.flatten(2)[:, None]).unflatten(3, (side, side))

        x = layer(x_RBHW[:, :, None], p["h1"], p["h1_bias"])
        x = layer(x, p["h2"] * self.sees, p["h2_bias"]).flatten(2)
        if self.rung.relu:
            x = F.dropout(x, 0.25, learning)
        x = act(torch.baddbmm(p["h3_bias"][:, None], x, p["h3"].mT))
        return torch.baddbmm(p["out_bias"][:, None], x, p["out"].mT)

    def losses(self, x_RBHW, y_RB):
        """(R,)"""
        said = self.forward(x_RBHW, learning=True)
        if self.rung.loss == "softmax":
            return F.cross_entropy(said.flatten(0, 1), y_RB.flatten(), reduction="none").view_as(y_RB).mean(1)
        wanted = F.one_hot(y_RB, 10) * 2.0 - 1.0
        return (torch.tanh(said) - wanted).square().mean((1, 2))


def learn(
    rung: Rung, digits, labels, taught: list[torch.Tensor], seeds: list[int], rates: list[float], show
) -> Networks:
    """A network for each entry of `taught` (which digits it may learn from), `seeds` and `rates`."""
    R, count = len(taught), min(map(len, taught))
    networks = Networks(R, rung, seeds)
    rate_R = torch.tensor(rates)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    torch.manual_seed(seeds[0])  # of dropout
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in networks.parameters.items()}
    steps_in_pass = count // rung.batch
    steps, step = steps_in_pass * rung.passes, 0
    for number in range(rung.passes):
        order_RN = torch.stack(
            [own[torch.randperm(len(own), generator=g)[:count]] for own, g in zip(taught, generators)]
        )
        for start in range(0, steps_in_pass * rung.batch, rung.batch):
            at = order_RN[:, start : start + rung.batch]
            x = moved(digits[at], generators[0]) if rung.moved else digits[at]
            networks.losses(x, labels[at]).sum().backward()
            step += 1
            scale = 1.0 if rung.optimizer == "sgd" else 1 - step / steps
            with torch.no_grad():
                for name, p in networks.parameters.items():
                    rate = (rate_R * scale).view(-1, *[1] * (p.dim() - 1))
                    p.sub_(rate * direction(p.grad, rung, moments[name], step))
                    p.grad = None
        show({"stage": "lecun1989", "step": number, "steps": rung.passes})
    return networks


def direction(gradient, rung: Rung, moments, step: int):
    if rung.optimizer == "sgd":
        return gradient
    first, second = moments
    first.lerp_(gradient, 0.1)
    second.lerp_(gradient.square(), 0.05)
    return (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)


def moved(x_RBHW, generator):
    """Each by -1, 0 or 1 pixels across and down; background comes in."""
    R, B, H, W = x_RBHW.shape
    padded = F.pad(x_RBHW, (1, 1, 1, 1), value=-1.0)
    down, across = torch.randint(0, 3, (2, R, B, 1, 1), generator=generator)
    rows, columns = torch.arange(H).view(1, 1, H, 1) + down, torch.arange(W).view(1, 1, 1, W) + across
    return padded[torch.arange(R).view(R, 1, 1, 1), torch.arange(B).view(1, B, 1, 1), rows, columns]


@torch.no_grad()
def wrong(networks: Networks, digits, labels, asked: list[torch.Tensor]) -> list[float]:
    """Share of the digits that each network is asked about and gets wrong."""
    count = min(map(len, asked))
    at = torch.stack([own[:count] for own in asked])
    return (networks.forward(digits[at]).argmax(-1) != labels[at]).float().mean(1).tolist()


# ── digits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def bundled():
    """scikit-learn's 1,797 digits of 8 x 8 (UCI Optical Recognition of Handwritten Digits), at 16 x 16 from -1 to 1."""
    if not importlib.util.find_spec("sklearn"):
        raise UserError("scikit-learn, which has the digits, is not installed: pip install 'nanoghost[lab]'")
    from sklearn.datasets import load_digits

    found = load_digits()
    return enlarged(torch.tensor(found.images, dtype=torch.float32) / 16), torch.tensor(found.target)


def enlarged(images_NHW):
    """(N, H, W) from 0 to 1 -> (N, 16, 16) from -1 to 1."""
    return F.interpolate(images_NHW[:, None], size=(16, 16), mode="bilinear", antialias=True)[:, 0] * 2 - 1


def mnist(folder: Path):
    """The four files of MNIST in their own format, packed or not: (7,291 digits and labels to learn, 2,007 to be asked), as many as in 1989."""

    def read(name: str):
        path = next((folder / f for f in (name, f"{name}.gz") if (folder / f).exists()), None)
        if path is None:
            raise UserError(f"there is no {name} (or {name}.gz) in {folder}: it takes the four files of MNIST")
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
        if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * len(sizes) + math.prod(sizes):
            raise UserError(f"{path} is not in MNIST's format")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * len(sizes)).view(sizes)

    generator, found = torch.Generator().manual_seed(1337), []
    for part, count in (("train", 7291), ("t10k", 2007)):
        images, labels = read(f"{part}-images-idx3-ubyte"), read(f"{part}-labels-idx1-ubyte")
        some = torch.randperm(len(images), generator=generator)[:count]
        found.append((enlarged(images[some].float() / 255), labels[some].long()))
    return torch.cat([found[0][0], found[1][0]]), torch.cat([found[0][1], found[1][1]]), len(found[0][0])


def splits(count: int, first_test: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(to learn, to be asked) of each fold; `first_test`: where the one test set begins, if there is one."""
    if first_test is not None:
        return [(torch.arange(first_test), torch.arange(first_test, count))]
    folds = torch.randperm(count, generator=torch.Generator().manual_seed(0)).chunk(FOLDS)
    return [(torch.cat([f for j, f in enumerate(folds) if j != i]), fold) for i, fold in enumerate(folds)]


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Lecun1989Settings:
    mnist: Path | None = None
    """A folder with the four files of MNIST; default: scikit-learn's digits, five times a fifth of them held out."""
    seeds: int = 3
    """Networks for each fold."""
    rungs: str = ""
    """Only those whose name has one of these words in it, with commas between; default: all."""
    force: bool = False
    """Do again what was done."""
    out: Path | None = None
    """Write the table into this Markdown file too, and a picture beside it."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: Lecun1989Settings) -> None:
    hardware.prepare()
    if settings.seeds < 1:
        raise UserError("--seeds must be at least 1")
    display = Display()
    first_test = None
    if settings.mnist:
        digits, labels, first_test = mnist(settings.mnist)
        kind = f"mnist-{sha256(digits.numpy().tobytes()).hexdigest()[:8]}"
    else:
        digits, labels = bundled()
        kind = "digits"
    asked = {name: rungs()[name] for name in select_names("--rungs", settings.rungs, rungs())}
    folder = home() / "lab" / "lecun1989"
    results = {}
    for name, rung in asked.items():
        slug = "".join(c if c.isalnum() else "-" for c in name)
        path = folder / f"{kind}-{settings.seeds}-{slug}.json"
        if settings.force or not path.exists():
            write_json(
                path, climb(name, rung, digits, labels, splits(len(digits), first_test), settings.seeds, display)
            )
        results[name] = read_json(path)
        display.print(f"{name}: {results[name]['error']:.2%} wrong")
    tell(results)
    if settings.out:
        write(
            settings.out,
            results,
            "MNIST" if settings.mnist else "scikit-learn's 1,797 digits, five times a fifth of them held out",
            settings.seeds,
        )
    if settings.json:
        print(json.dumps({"rungs": results}))


def climb(name: str, rung: Rung, digits, labels, folds, seeds: int, display) -> dict:
    """Choose the learning rate of a rung on digits that are held out of the first fold's lessons, then measure it on all folds."""
    start = time.perf_counter()

    def show(event):
        display.show({**event, "task": name})

    def some(own):
        return own[: int(len(own) * rung.digits)]

    own = folds[0][0]
    back = len(own) // 5
    candidates = RATES[rung.optimizer]
    tried = learn(
        rung, digits, labels, [some(own[back:])] * len(candidates), [0] * len(candidates), list(candidates), show
    )
    errors = wrong(tried, digits, labels, [own[:back]] * len(candidates))
    rate = candidates[min(range(len(candidates)), key=errors.__getitem__)]
    places = [(fold, seed) for seed in range(seeds) for fold in folds]
    networks = learn(
        rung,
        digits,
        labels,
        [some(fold[0]) for fold, _ in places],
        [1 + seed for _, seed in places],
        [rate] * len(places),
        show,
    )
    found = wrong(networks, digits, labels, [fold[1] for fold, _ in places])
    by_seed = [statistics.mean(found[i * len(folds) : (i + 1) * len(folds)]) for i in range(seeds)]
    return {
        "error": statistics.mean(by_seed), "spread": statistics.stdev(by_seed) if seeds > 1 else None, "by_seed": by_seed,
        "learning_rate": rate, "tried": dict(zip(map(str, candidates), errors)), "weights": networks.weights(),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


HEADS = ("", "wrong", "of the one before", "weights", "learning rate", "seconds")


def rows_of(results: dict) -> list[tuple[str, ...]]:
    rows, before = [], dict(zip(list(LADDER)[1:], LADDER))
    for name, r in results.items():
        spread = f" ±{r['spread']:.2%}" if r["spread"] is not None else ""
        last = results.get(before.get(name))
        change = f"{r['error'] / last['error'] - 1:+.0%}" if last else ""
        rows.append(
            (
                name,
                f"{r['error']:.2%}{spread}",
                change,
                f"{r['weights']:,}",
                f"{r['learning_rate']:g}",
                f"{r['seconds']:.0f}",
            )
        )
    return rows


def tell(results: dict) -> None:
    table = Table(*HEADS)
    for row in rows_of(results):
        table.add_row(*row)
    Console(stderr=True).print(table)


def write(path: Path, results: dict, digits: str, seeds: int) -> None:
    """The table as Markdown, and bars as an SVG of the same name beside it."""
    lines = [HEADS, ["---"] * len(HEADS), *rows_of(results)]
    parts = [
        "# 1989 to now: a network that reads digits",
        f"Made by `{shlex.join(['nanoghost', *sys.argv[1:]])}`: {digits}, {seeds} seeds.",
    ]
    parts += [
        f"![Bars of the same figures]({path.stem}.svg)",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
    ]
    write_atomic(path, "\n\n".join(parts) + "\n")
    wrong_of_1000 = {
        name: {"mean": 1000 * r["error"], "spread": r["spread"] and 1000 * r["spread"]} for name, r in results.items()
    }
    picture = bar_charts([("Errors on 1,000 held-out digits", wrong_of_1000, 5.0, "{:.1f}")])
    write_atomic(path.with_suffix(".svg"), picture)
