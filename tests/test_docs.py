"""The documents match the code: links, files, identifiers and flags that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
CHECKED_NAMES = ("architecture.md", "troubleshooting.md")
FILE_ENDING = r"\.(py|cpp|json|jsonl|safetensors|html|toml|txt|tar\.gz)$"
OTHER_PROGRAMS_FLAGS = {"--nproc-per-node", "--max-restarts"}  # of torchrun


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```|^    .*$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """The id that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def source_code() -> str:
    files = [*(ROOT / "nanoghost").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    return "\n".join(path.read_text() for path in files)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"https?:", link):
            continue
        file, _, heading = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), link
        if heading and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in map(anchor, headings), link


def test_the_module_map_of_architecture_md_lists_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = set()
    for package, table in re.findall(r"^### `(nanoghost/[\w/]*)`\n(.*?)(?=^###|\Z)", text, re.MULTILINE | re.DOTALL):
        listed |= {package + file for file in re.findall(r"^\| `(\w+\.py)`", table, re.MULTILINE)}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nanoghost").rglob("*.py")}
    assert listed == {module for module in modules if not module.endswith("__init__.py")}


@pytest.mark.parametrize("name", CHECKED_NAMES)
def test_files_identifiers_and_flags_exist(name):
    text = (ROOT / "docs" / name).read_text()
    source = source_code()
    for code in re.findall(r"`([^`\n]+)`", without_code_blocks(text)):
        if re.fullmatch(r"(nanoghost|tests|runs)/[\w/]+\.\w+", code):
            assert (ROOT / code).exists(), code
        elif re.search(FILE_ENDING, code):
            continue  # those of the module map are checked above, the others are in users' folders
        elif re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", code):
            for word in code.split("."):
                assert re.search(rf"\b{word}\b", source), code
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - OTHER_PROGRAMS_FLAGS:
        field = flag.removeprefix("--").replace("-", "_")
        assert re.search(rf"^    {field}: ", source, re.MULTILINE), flag
