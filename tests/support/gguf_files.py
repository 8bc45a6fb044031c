"""GGUF files as Python values: read one, change it, write it."""

from pathlib import Path

import gguf
import numpy as np

from nanoghost.formats.gguf_reader import GGUFFile


def read_gguf(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(fields, tensors) as Python values and fp32 arrays."""
    file = GGUFFile(path)
    fields = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.fields.items()}
    return fields, {name: file.read_tensor(name) for name in file.tensors}


def write_gguf(path: Path, fields: dict, tensors: dict[str, np.ndarray], **options) -> None:
    """Write with llama.cpp's library, which does not check what a value means. `options`: of its GGUFWriter."""
    value_types = {str: "STRING", bool: "BOOL", int: "INT64", float: "FLOAT64", list: "ARRAY"}
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.kv_data = [{}]
    for key, value in fields.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[value_types[type(value)]])
    for name, x in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
