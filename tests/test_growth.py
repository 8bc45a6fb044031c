"""docs/growth.md says that each of its commits runs. Here each is unpacked and asked for its help."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMITS = re.findall(r"^\| `([0-9a-f]{7})` \|", (ROOT / "docs" / "growth.md").read_text(), re.M)


def git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", ROOT, *words], capture_output=True)


def test_growth_page_names_commits():
    assert len(COMMITS) > 30
    assert len(set(COMMITS)) == len(COMMITS)


@pytest.mark.parametrize("commit", COMMITS)
def test_commit_of_the_growth_page_runs(commit, tmp_path):
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != b"false":
        pytest.skip("the history is not here: a shallow clone or an unpacked archive")
    assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0
    archive = subprocess.run(["git", "-C", ROOT, "archive", commit, "nanoghost"], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", tmp_path], input=archive.stdout, check=True)
    command = [sys.executable, "-m", "nanoghost", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: nanoghost" in done.stdout
