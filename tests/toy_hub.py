"""A hub of data sets on this machine, which answers what huggingface_hub asks (1.31 to 2.4), counts and can fail.

/api/datasets/OWNER/NAME[/revision/REVISION]        commit of a revision
/api/datasets/OWNER/NAME/tree/COMMIT?recursive=     files, in pages of two, by Link headers
/datasets/OWNER/NAME/resolve/COMMIT/PATH            headers of a file, and where its bytes are
/storage/SHA256                                     the bytes, in ranges too
"""

import hashlib
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

PAGE = 2


@dataclass
class ToyHub:
    """Holds data sets by name and commit, and what was asked for.

    cuts: by path, after how many bytes each of the next answers breaks off.
    errors: by path, how many of the next requests are answered with 503; "api" is what is no file.
    delays: by path, how many seconds each answer takes.
    fetched: by path, how often its bytes were asked for; ranges: the Range header of each such request.
    """

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    commits: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cuts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    errors: Counter[str] = field(default_factory=Counter)
    delays: dict[str, float] = field(default_factory=dict)
    fetched: Counter[str] = field(default_factory=Counter)
    ranges: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    num_listed: int = 0
    endpoint: str = ""
    storage: str = ""

    def commit(self, repo: str, files: Mapping[str, bytes], *revisions: str) -> str:
        """Add a commit; the revisions, main where none is named, are it from now on."""
        content = repr((repo, sorted(files.items()), len(self.files))).encode()
        commit = hashlib.sha1(content).hexdigest()
        self.files[repo, commit] = dict(files)
        for revision in (*(revisions or ("main",)), commit):
            self.commits[repo, revision] = commit
        return commit

    def push(self, repo: str, folder: Path, *revisions: str) -> str:
        """Add all files of a folder as a commit."""
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.commit(repo, files, *revisions)

    def stored(self, digest: str) -> tuple[str, bytes]:
        """Find the bytes of a digest, and a path that has them."""
        for files in self.files.values():
            for path, content in files.items():
                if hashlib.sha256(content).hexdigest() == digest:
                    return path, content
        raise LookupError(digest)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: ToyHub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet rather than two, behind the first of which a client is silent for 40 ms

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.split("/")[1:]]
        if parts[:2] == ["api", "datasets"]:
            self.about("/".join(parts[2:4]), parts[4:], parse_qs(address.query))
        elif parts[0] == "storage":
            self.send_content(parts[1])
        elif parts[0] == "datasets" and parts[3] == "resolve":
            self.resolve("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self.refuse(404, "")

    do_HEAD = do_GET

    def about(self, repo: str, parts: list[str], query: dict[str, list[str]]) -> None:
        if not any(name == repo for name, _ in self.hub.files):
            return self.refuse(401, "RepoNotFound")
        revision = parts[1] if len(parts) > 1 else "main"
        commit = self.hub.commits.get((repo, revision))
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        time.sleep(self.hub.delays.get("api", 0))
        if self.fails("api"):
            return None
        if parts[:1] != ["tree"]:
            return self.send_json({"id": repo, "sha": commit, "siblings": []})
        self.hub.num_listed += 1
        assert query["recursive"] == ["True"] or query["recursive"] == ["true"]
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "data", "oid": "0" * 40}]
        for path, content in sorted(self.hub.files[repo, commit].items()):
            digest = hashlib.sha256(content).hexdigest()
            lfs = {"oid": digest, "size": len(content), "pointerSize": 100}
            entries.append({"type": "file", "path": path, "size": len(content), "oid": digest[:40], "lfs": lfs})
        start = int(query.get("cursor", ["0"])[0])
        following = f"{self.hub.endpoint}/api/datasets/{repo}/tree/{revision}?recursive=true&cursor={start + PAGE}"
        links = {"Link": f'<{following}>; rel="next"'} if start + PAGE < len(entries) else {}
        return self.send_json(entries[start : start + PAGE], links)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        """Say where a file is, as the hub does of large ones: at another address."""
        if repo in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        commit = self.hub.commits[repo, revision]
        content = self.hub.files[repo, commit].get(path)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        if self.fails(path):
            return None
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "Location": f"{self.hub.storage}/storage/{digest}",
            "X-Repo-Commit": commit,
            "X-Linked-ETag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
        }
        return self.send_json({}, headers, status=302)

    def send_content(self, digest: str) -> None:
        path, content = self.hub.stored(digest)
        asked = self.headers["Range"]
        if self.command == "GET":
            self.hub.fetched[path] += 1
            self.hub.ranges[path].append(asked)
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            time.sleep(self.hub.delays.get(path, 0))
            cuts = self.hub.cuts[path]
            self.wfile.write(content[start : cuts[0] if cuts else None])
            if cuts and cuts.pop(0) < len(content):
                self.close_connection = True

    def fails(self, path: str) -> bool:
        if not self.hub.errors[path]:
            return False
        self.hub.errors[path] -= 1
        self.refuse(503, "")
        return True

    def refuse(self, status: int, code: str) -> None:
        self.send_json({"error": code}, {"X-Error-Code": code} if code else {}, status=status)

    def send_json(self, value: Any, headers: Mapping[str, str] = {}, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        for name, header in headers.items():
            self.send_header(name, header)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


@contextmanager
def serving() -> Iterator[ToyHub]:
    """Run a hub on loopback."""
    hub = ToyHub()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    # Another name of the same host: clients go on to a host of the same name by themselves, and to others not.
    hub.endpoint, hub.storage = (f"http://{name}:{server.server_port}" for name in ("127.0.0.1", "localhost"))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def use(hub: ToyHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub of this process ask a hub, with a cache of its own."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)


def environment_of(hub: ToyHub, cache: Path) -> dict[str, str]:
    """What lets another process ask it."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }
