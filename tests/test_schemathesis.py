"""schemathesis generates valid and invalid requests from /openapi.json and checks every response against it.

make api     # installs schemathesis and runs this
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serving import NOTE, ServerProcess, make_home

pytest.importorskip("schemathesis", reason="schemathesis is not installed: make api")

CASES = 2000
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance"
)


def test_every_response_is_documented(tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "notes.md").write_text(NOTE)
    server = ServerProcess(make_home(tmp_path / "home"), "toy", "--slots", 24, "--documents", documents)
    report = tmp_path / "report.json"
    command = [
        Path(sys.executable).with_name("st"),
        "run",
        f"{server.url}/openapi.json",
        "--seed",
        "0",
        "--max-examples",
        "300",
        "--request-timeout",
        "120",
        "--phases",
        "coverage,fuzzing",
        "--checks",
        CHECKS,
        "--continue-on-failure",
        "--no-shrink",
        "--suppress-health-check",
        "all",
        "--generation-database",
        "none",
        "--report",
        "json",
        "--report-json-path",
        report,
    ]
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-5000:]
        assert server.figure("nanoghost_engine_starts") == 1, "no request killed the engine"
    finally:
        server.stop()
    cases = json.loads(report.read_text())["test_cases"]
    print(f"{cases['generated']} cases")
    assert cases["generated"] >= CASES and not cases["with_failures"]
