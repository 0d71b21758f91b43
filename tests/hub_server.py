"""A Hugging Face Hub of one repository on localhost, for the real client to download from.

It speaks what the client uses: model info, refs, tree, resolve (HEAD and GET with Range; large
files are redirected to another path, as to the CDN of the Hub), and its error headers. It offers
large files over Xet as well, as the Hub does, and has nobody there who would send them. Faults can
be set.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

BLOCK = 65536
REPO = "Qwen/Qwen3-Test"


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Hub:
    """The repository and what is wrong with it; a test changes it while the server runs."""

    commits: dict[str, dict[str, bytes]]
    """Files by commit."""
    branches: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    gated_for: str | None = None
    """Only this token may read files."""
    refused_token: str | None = None
    page: bytes | None = None
    """Answer everything with this, as a proxy does that wants a login."""
    silent: bool = False
    """Give no sizes, digests or blobs of files."""
    down: bool = False
    """Answer everything with 503."""
    drop_after: int | None = None
    """Large files: drop the connection after so many bytes of the first request, once."""
    stall_after: int | None = None
    """Large files: send so many bytes of a whole file, then nothing until `released`."""
    truncate_to: int | None = None
    """Large files: the server itself has only so many bytes, and says so."""
    damage: bool = False
    """Large files: the right length, another content."""
    released: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    cdn: str = ""
    """The same server under another name: the client treats another host as the Hub's CDN."""

    def resolve(self, revision: str) -> str | None:
        commit = {**self.tags, **self.branches}.get(revision, revision)
        return commit if commit in self.commits else None

    def seen(self, method: str, part: str) -> list[Request]:
        return [r for r in self.requests if r.method == method and part in r.path]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", "tokenizer.json"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        self.hub.requests.append(
            Request(self.command, path, self.headers.get("Range"), authorization)
        )
        if self.hub.page is not None:
            return self.send_content(self.hub.page, {"Content-Type": "text/html"})
        if self.hub.down:
            return self.fail(503, None, "Service Unavailable")
        if self.hub.refused_token and authorization == f"Bearer {self.hub.refused_token}":
            return self.fail(401, None, "Invalid credentials in Authorization header")
        api = f"/api/models/{REPO}"
        if path == api or path.startswith(f"{api}/revision/"):
            return self.model_info(path.removeprefix(api).removeprefix("/revision/") or "main")
        if path == f"{api}/refs":
            return self.refs()
        if path.startswith(f"{api}/tree/"):
            return self.tree(path.removeprefix(f"{api}/tree/"))
        if path.startswith(f"/{REPO}/resolve/"):
            return self.resolve(*path.removeprefix(f"/{REPO}/resolve/").split("/", 1))
        if path.startswith("/cdn/"):
            return self.cdn(*path.removeprefix("/cdn/").split("/", 1))
        return self.fail(401, "RepoNotFound", "Repository not found")

    def model_info(self, revision: str) -> None:
        commit = self.hub.resolve(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = []
        for name, content in self.hub.commits[commit].items():
            sibling = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
            if is_large(name):
                sibling["lfs"] = {
                    "sha256": sha256(content),
                    "size": len(content),
                    "pointerSize": 130,
                }
            siblings.append({"rfilename": name} if self.hub.silent else sibling)
        self.send_json({"id": REPO, "modelId": REPO, "sha": commit, "siblings": siblings})

    def refs(self) -> None:
        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
                for name, commit in refs.items()
            ]

        self.send_json(
            {
                "branches": listed("heads", self.hub.branches),
                "tags": listed("tags", self.hub.tags),
                "converts": [],
            }
        )

    def tree(self, revision: str) -> None:
        entries = []
        for name, content in self.hub.commits[self.hub.resolve(revision) or ""].items():
            entry = {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": git_blob(content),
            }
            if is_large(name):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
                entry["xetHash"] = sha256(content)
            entries.append(entry)
        self.send_json(entries)

    def resolve(self, revision: str, name: str) -> None:
        commit = self.hub.resolve(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        allowed = f"Bearer {self.hub.gated_for}"
        if self.hub.gated_for and self.headers.get("Authorization") != allowed:
            status = 403 if self.headers.get("Authorization") else 401
            return self.fail(status, "GatedRepo", f"Access to model {REPO} is restricted.")
        content = self.hub.commits[commit].get(name)
        if content is None:
            return self.fail(404, "EntryNotFound", "Entry not found")
        if not is_large(name):
            return self.send_content(
                content, {"ETag": f'"{git_blob(content)}"', "X-Repo-Commit": commit}
            )
        self.send_response(302)
        self.send_header("Location", f"{self.hub.cdn}/{commit}/{name}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-ETag", f'"{sha256(content)}"')
        self.send_header("X-Xet-Hash", sha256(content))
        self.send_header("X-Xet-Refresh-Route", f"{self.hub.url}/xet-read-token")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def cdn(self, commit: str, name: str) -> None:
        content = self.hub.commits[commit][name]
        if name.endswith(".safetensors"):
            if self.hub.damage:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if self.hub.truncate_to is not None:
                content = content[: self.hub.truncate_to]
        self.send_content(content, {"ETag": f'"{sha256(content)}"'})

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        first = 0
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
        if first >= len(content) > 0:
            return self.fail(416, None, "Range not satisfiable")
        self.send_response(206 if wanted else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.send_body(content[first:], faulty="/cdn/" in self.path and not wanted)

    def send_body(self, body: bytes, faulty: bool) -> None:
        large = self.path.endswith(".safetensors") and faulty
        for start in range(0, len(body), BLOCK):
            if large and self.hub.stall_after is not None and start >= self.hub.stall_after:
                self.hub.stalled.set()
                self.hub.released.wait(60)
                self.close_connection = True
                return
            if large and self.hub.drop_after is not None and start >= self.hub.drop_after:
                self.hub.drop_after = None
                self.close_connection = True
                return
            try:
                self.wfile.write(body[start : start + BLOCK])
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
                return

    def send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def fail(self, status: int, code: str | None, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the Hub on a free port of localhost; its address is put into `hub.url`."""
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        hub.cdn = f"http://localhost:{server.server_address[1]}/cdn"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.released.set()
            server.shutdown()
            thread.join()
