"""`nanoghost tokenizer train` and `nanoghost tokenizer eval`: train a tokenizer, and measure how it compresses text.

Bytes per token measures the tokenizer alone. A higher value means fewer decoding steps for the same text, but also
rarer tokens and a larger output layer. Whether that pays is visible only in a model's bits per byte.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost.data.registry import open_data_source
from nanoghost.errors import UserError
from nanoghost.home import home
from nanoghost.progress import JsonFlag
from nanoghost.tokenizer.tokenizer import Tokenizer

# Macbeth is held out of the default training text; the rest is written for this file.
SAMPLES = {
    "verse": """To-morrow, and to-morrow, and to-morrow,
Creeps in this petty pace from day to day,
To the last syllable of recorded time;
And all our yesterdays have lighted fools
The way to dusty death. Out, out, brief candle!
Life's but a walking shadow; a poor player
That struts and frets his hour upon the stage
And then is heard no more. It is a tale
Told by an idiot, full of sound and fury,
Signifying nothing.
""",
    "prose": """The bus was late again, so I walked. It had rained all night and the pavement smelled of wet leaves \
and diesel. Near the station someone had set up a coffee cart, and the queue went halfway round the block. I don't \
usually stop, but my phone was nearly dead and the woman in front of me was telling a story about her neighbour's \
parrot, which had apparently learned to imitate the microwave.
""",
    "Python": '''from collections import deque

def shortest_path(graph, start, goal):
    """Breadth-first search; returns the nodes on the way, or None."""
    came_from = {start: None}
    frontier = deque([start])
    while frontier:
        node = frontier.popleft()
        if node == goal:
            path = []
            while node is not None:
                path.append(node)
                node = came_from[node]
            return path[::-1]
        for neighbour in graph[node]:
            if neighbour not in came_from:
                came_from[neighbour] = node
                frontier.append(neighbour)
    return None
''',
    "numbers": """2026-03-14 08:15, 1013.25 hPa, 17.4 C, 62%
2026-03-14 09:15, 1012.80 hPa, 18.9 C, 58%
31415 + 27182 = 58597; 58597 * 12 = 703164; 703164 / 36 = 19532.333
""",
    "other scripts": """Утром мы вышли к реке, и туман ещё лежал над водой.
朝、川に着いたとき、水の上にはまだ霧がかかっていた。
早晨我们走到河边,水面上还笼罩着一层薄雾。
صباحًا وصلنا إلى النهر وكان الضباب لا يزال فوق الماء.
सुबह हम नदी पर पहुँचे, पानी पर अब भी कोहरा था।
Το πρωί φτάσαμε στο ποτάμι και η ομίχλη σκέπαζε ακόμα το νερό.
""",
}


@dataclass(frozen=True)
class TokenizerTrainSettings:
    data: str = "plays"
    """Training text: plays, a file or folder (.txt .md .jsonl .json .parquet), or hub:OWNER/NAME."""
    vocab_size: int = 4096
    """Number of tokens, with the 256 bytes and the special tokens; fewer if the text has too few repeated pairs."""
    name: str = "plays-4096"
    """Name of the tokenizer, a folder in data/tokenizers of the home folder."""


@dataclass(frozen=True)
class TokenizerEvalSettings(JsonFlag):
    name: str = "plays-4096"
    """Name of the tokenizer."""


def tokenizer_folder(name: str) -> Path:
    """Folder of the tokenizer with that name. Raises UserError if the name is a path."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UserError(f"'{name}' is not a tokenizer name: use letters from a to z, digits, '.', '_' and '-'")
    return home() / "data" / "tokenizers" / name


def train_command(settings: TokenizerTrainSettings) -> None:
    folder = tokenizer_folder(settings.name)
    documents = open_data_source(settings.data).documents()
    tokenizer = Tokenizer.train((d.text for d in documents if d.split == "train"), settings.vocab_size)
    tokenizer.save(folder)
    Console(stderr=True).print(f"tokenizer {settings.name}: {tokenizer.vocab_size} tokens, in {folder}", soft_wrap=True)


def eval_command(settings: TokenizerEvalSettings) -> None:
    console = Console(stderr=True)
    tokenizer = Tokenizer.load(tokenizer_folder(settings.name))
    figures = {kind: bytes_per_token(tokenizer.encode, text) for kind, text in SAMPLES.items()}
    gpt2 = None
    if gpt2_encode := gpt2_encoder():
        gpt2 = {kind: bytes_per_token(gpt2_encode, text) for kind, text in SAMPLES.items()}

    table = Table("text", "bytes", settings.name, title=f"bytes per token, {tokenizer.vocab_size} tokens")
    if gpt2:
        table.add_column("gpt2")
    for kind, text in SAMPLES.items():
        row = [kind, str(len(text.encode())), f"{figures[kind]:.2f}"]
        if gpt2:
            row.append(f"{gpt2[kind]:.2f}")
        table.add_row(*row)
    console.print(table)
    if not gpt2:
        console.print(
            "No comparison with GPT-2: tiktoken is not installed, or cannot download its files", soft_wrap=True
        )
    if settings.json:
        result = {
            "name": settings.name,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "bytes_per_token": figures,
            "gpt2_bytes_per_token": gpt2,
        }
        print(json.dumps(result))


def bytes_per_token(encode: Callable[[str], list[int]], text: str) -> float:
    return len(text.encode()) / len(encode(text))


def gpt2_encoder() -> Callable[[str], list[int]] | None:
    """GPT-2's encoder, or None if tiktoken is not installed or cannot download its files."""
    try:
        import requests
        import tiktoken
    except ModuleNotFoundError:
        return None
    try:
        return tiktoken.get_encoding("gpt2").encode_ordinary
    except requests.RequestException:
        return None
