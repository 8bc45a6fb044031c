"""`tokenizer train` and `tokenizer eval`: make a vocabulary, and see which kinds of text it shortens.

Bytes per token is the compression of the vocabulary alone. More is fewer steps for the model to write the same text,
at the price of rarer tokens and a wider last layer; which wins is measured in bits per byte, not here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost.data.registry import open_source
from nanoghost.errors import UserError
from nanoghost.home import home
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
    """Learn a vocabulary from the training part of a text.

    nanoghost tokenizer train --data notes/ --vocab-size 2048 --name notes-2048
    """

    data: str = "plays"
    """Text to learn from: plays, a file or folder (.txt .md .jsonl .parquet), or hub:OWNER/NAME."""
    vocab_size: int = 4096
    """Tokens, with the 256 bytes and the special tokens; fewer if the text has no more pairs that occur twice."""
    name: str = "plays-4096"
    """Under which it is kept, in data/tokenizers of the home folder."""


@dataclass(frozen=True)
class TokenizerEvalSettings:
    """Bytes per token of a vocabulary on several kinds of text.

    nanoghost tokenizer eval --name plays-4096
    """

    name: str = "plays-4096"
    """Of the vocabulary."""
    json: bool = False
    """Print the figures as one JSON object on standard output."""


def tokenizer_folder(name: str) -> Path:
    """Where the vocabulary of that name is kept."""
    if Path(name).name != name:
        raise UserError(f"'{name}' is not a tokenizer's name: use a plain name, without '/'")
    return home() / "data" / "tokenizers" / name


def train_command(settings: TokenizerTrainSettings) -> None:
    folder = tokenizer_folder(settings.name)
    documents = open_source(settings.data).documents()
    tokenizer = Tokenizer.train((d.text for d in documents if d.split == "train"), settings.vocab_size)
    tokenizer.save(folder)
    Console(stderr=True).print(f"tokenizer {settings.name}: {tokenizer.vocab_size} tokens, in {folder}", soft_wrap=True)


def eval_command(settings: TokenizerEvalSettings) -> None:
    screen = Console(stderr=True)
    tokenizer = Tokenizer.load(tokenizer_folder(settings.name))
    ours = {kind: bytes_per_token(tokenizer.encode, text) for kind, text in SAMPLES.items()}
    gpt2_encode = find_gpt2()
    gpt2 = {kind: bytes_per_token(gpt2_encode, text) for kind, text in SAMPLES.items()} if gpt2_encode else None

    table = Table("text", "bytes", settings.name, title=f"bytes per token, {tokenizer.vocab_size} tokens")
    if gpt2:
        table.add_column("gpt2")
    for kind, text in SAMPLES.items():
        row = [f"{figures[kind]:.2f}" for figures in (ours, gpt2) if figures]
        table.add_row(kind, str(len(text.encode())), *row)
    screen.print(table)
    if not gpt2:
        screen.print("GPT-2's vocabulary is not beside it: tiktoken or its files are not here", soft_wrap=True)
    if settings.json:
        figures = {
            "name": settings.name,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "bytes_per_token": ours,
            "gpt2_bytes_per_token": gpt2,
        }
        print(json.dumps(figures))


def bytes_per_token(encode: Callable[[str], list[int]], text: str) -> float:
    return len(text.encode()) / len(encode(text))


def find_gpt2() -> Callable[[str], list[int]] | None:
    """GPT-2's encoder, if tiktoken is installed and has its files or a network to fetch them."""
    try:
        import requests
        import tiktoken
    except ModuleNotFoundError:
        return None
    try:
        return tiktoken.get_encoding("gpt2").encode_ordinary
    except requests.RequestException:
        return None
