"""Code blocks of the documents: the tests run them."""

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class CodeBlock:
    section: str
    """Heading of the section, of any level."""
    language: str
    """First word after the opening fence."""
    path: str
    """File that the line before the block names, as in "`nanoghost/cli.py`:"; empty if it names none."""
    code: str


def code_blocks(name: str) -> list[CodeBlock]:
    """The fenced code blocks of a document in docs/, in order."""
    heading = r"^#+ (?P<heading>[^\n]*)$"
    block = r"(?:^`(?P<path>[\w/.]+)`[^\n]*:\n\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    section, blocks = "", []
    for match in re.finditer(f"{heading}|{block}", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL):
        if match["heading"]:
            section = match["heading"]
        else:
            blocks.append(CodeBlock(section, match["language"], match["path"] or "", match["code"]))
    return blocks


def apply_diff(source: str, diff: str) -> str:
    """The source after a diff whose hunks are separated by lines "@@". Each hunk must match in exactly one place."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(old) == 1, f"found {source.count(old)} times:\n{old}"
        source = source.replace(old, new)
    return source


def stated_output(code: str) -> list[str]:
    """What the print statements of a block print, as the comments behind them say."""
    return re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
