"""Open the data source that `--data` names.

open_data_source("plays")                     Shakespeare, split by whole works (the default)
open_data_source("notes/")                    .txt, .md, .jsonl, .json and .parquet files, or folders of them
open_data_source("hub:HuggingFaceFW/fineweb-edu:sample-10BT")
open_data_source("s3://bucket/folder")        the same files elsewhere, by URL
open_data_source("plays=0.7,notes/=0.3")      a mixture by weight
open_data_source("clean")                     text that `nanoghost data refine` produced under this name
"""

import os
from pathlib import Path

from nanoghost.data.hub import open_hub
from nanoghost.data.local import open_local
from nanoghost.data.mixture import is_mixture, mix_sources, parse_mixture
from nanoghost.data.plays import fetch_plays, open_plays
from nanoghost.data.refined import open_refined, refined_folder
from nanoghost.data.remote import open_remote
from nanoghost.data.sources import Source
from nanoghost.errors import UserError

ACCEPTED = (
    "'plays', a .txt, .md, .jsonl, .json or .parquet file, a folder of them, hub:OWNER/NAME[:CONFIG], a URL (s3://...),"
    " the name of refined data, or a mixture (plays=0.7,notes/=0.3)"
)


def open_data_source(spec: str) -> Source:
    """The source that `spec` names. Raises UserError if it is missing, empty or unknown."""
    if not spec:
        raise UserError(f"--data is empty: it can be {ACCEPTED}")
    if spec == "plays":
        return open_plays(fetch_plays())
    path = Path(spec).expanduser()
    if os.path.exists(path):  # unlike path.exists(), it takes a mixture that is too long for a name
        return open_local(path)
    if is_mixture(spec):
        parts = [(open_data_source(name), weight) for name, weight in parse_mixture(spec)]
        return mix_sources(parts)
    if spec.startswith("hub:"):
        return open_hub(spec)
    if "://" in spec:
        return open_remote(spec)
    folder = refined_folder(spec)
    if folder:
        return open_refined(folder)
    raise UserError(f"no data called '{spec}': it can be {ACCEPTED}")
