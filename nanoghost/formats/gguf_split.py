"""GGUF models in several files, NAME-00001-of-00003.gguf and so on: `llama-gguf-split` cuts large ones like that.

The first part has the metadata, each part has some of the tensors.
"""

import re
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.validation import check_fields, integer, optional

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
SPLIT_CHECKS = {
    "split.no": optional(integer(0, 2**16)),
    "split.count": optional(integer(0, 2**16)),
    "split.tensors.count": optional(integer(0, 2**31)),
}


def gguf_stem(path: Path) -> str:
    """The name of a GGUF file without its ending, and without the number of the part."""
    part = PART_NAME.fullmatch(path.name)
    return part["stem"] if part else re.sub(r"(?i)\.gguf$", "", path.name)


def open_gguf(path: Path) -> GGUFFile:
    """A GGUF file; of a split one, any part may be given, and the result has the tensors of all parts."""
    file = GGUFFile(path)
    check_fields(file.fields, SPLIT_CHECKS, path)
    count = file.fields.get("split.count") or 1
    if count == 1:
        return file
    parts = [GGUFFile(part) for part in part_paths(path, file.fields.get("split.no", 0), count)]
    for number, part in enumerate(parts):
        check_fields(part.fields, SPLIT_CHECKS, part.path)
        position = part.fields.get("split.no"), part.fields.get("split.count")
        if position != (number, count):
            raise UserError(f"{part.path} is not what its name says: part {number + 1} of {count} of a GGUF model")
    whole = parts[0]
    for part in parts[1:]:
        twice = whole.tensors.keys() & part.tensors.keys()
        if twice:
            raise UserError(f"{part.path} has the tensor '{min(twice)}', which is in an earlier part as well")
        whole.tensors |= part.tensors
    expected = whole.fields.get("split.tensors.count", len(whole.tensors))
    if len(whole.tensors) != expected:
        raise UserError(f"the {count} parts of {whole.path} have {len(whole.tensors)} tensors instead of {expected}")
    return whole


def part_paths(path: Path, number: int, count: int) -> list[Path]:
    """All parts in their order; they lie next to each other."""
    name = PART_NAME.fullmatch(path.name)
    if not name or int(name["count"]) != count:
        raise UserError(
            f"{path} is part {number + 1} of {count} of a GGUF model: put all parts into one folder, with names like"
            f" NAME-{number + 1:05d}-of-{count:05d}.gguf"
        )
    paths = [path.with_name(f"{name['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = next((part for part in paths if not part.exists()), None)
    if missing:
        raise UserError(f"{path} is one of {count} parts of a GGUF model, and {missing.name} is not next to it")
    return paths
