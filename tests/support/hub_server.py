"""A local server that answers like the Hugging Face Hub, as far as `huggingface_hub.snapshot_download` asks."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

REPOSITORY = "maker/tiny"
COMMIT = "0123456789" * 4


class HubServer(ThreadingHTTPServer):
    """Serves the files of `folder` as REPOSITORY; any other name is answered with 404."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.folder = folder
        self.requested_files: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubRequestHandler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self):
        path = urlsplit(self.path).path
        paths = [p for p in sorted(self.server.folder.rglob("*")) if p.is_file()]
        files = {p.relative_to(self.server.folder).as_posix(): p for p in paths}
        if not path.removeprefix("/api/models").startswith(f"/{REPOSITORY}/"):
            self.send_error(404)
            return
        name = ""
        if "/revision/" in path:
            body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}).encode()
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": n} for n, p in files.items()]
            body = json.dumps(entries).encode()
        else:
            _, _, name = path.partition(f"/resolve/{COMMIT}/")
            self.server.requested_files.add(name)
            body = files[name].read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        """Keep the test's output quiet."""
