"""A small server that answers like the Hub: repositories in memory, one commit per push."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories as lists of commits, each a dict of files by path."""

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self.visibility: dict[str, Any] = {}

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        history = self.commits.setdefault(repo, [])
        digest = hashlib.sha1(f"{repo} {len(history)}".encode()).hexdigest()
        history.append((digest, files))
        return digest

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        history = self.commits.get(repo, [])
        if revision == "main" and history:
            return history[-1]
        return next((commit for commit in history if commit[0] == revision), None)


@contextmanager
def serving() -> Iterator[tuple[str, Hub]]:
    """The address of a running server, and the repositories that it holds."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.hub.requests.append(f"POST {self.path}")
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self._error(401, "Unauthorized")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.commits:
                return self._json({"url": f"http://{self.headers['Host']}/{repo}"}, status=409)
            self.hub.visibility[repo] = asked.get("visibility") or asked.get("private")
            self.hub.commit(repo, {})
            return self._json({"url": f"http://{self.headers['Host']}/{repo}"})
        if found := re.fullmatch(r"/api/models/(.+/.+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self._json({"files": modes})
        if found := re.fullmatch(r"/api/models/(.+/.+)/commit/main", path):
            repo = found[1]
            head, before = self.hub.commits[repo][-1]
            files = dict(before)
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "header" and item["value"].get("parentCommit") != head:
                    return self._error(412, "the branch has moved")
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    files[item["value"]["path"]] = content
            oid = self.hub.commit(repo, files)
            return self._json(
                {
                    "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{oid}",
                    "commitOid": oid,
                    "success": True,
                }
            )
        return self._error(404, "no such route")

    def _get(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            commit = self.hub.at(found[1], found[2] or "main")
            if commit is None:
                return self._error(404, "RepoNotFound")
            files = [{"rfilename": name} for name in commit[1]]
            return self._json({"id": found[1], "sha": commit[0], "siblings": files})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            commit = self.hub.at(found[1], found[2])
            if commit is None:
                code = "RevisionNotFound" if found[1] in self.hub.commits else "RepoNotFound"
                return self._error(404, code)
            if found[3] not in commit[1]:
                return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit[0]})
            content = commit[1][found[3]]
            headers = {
                "X-Repo-Commit": commit[0],
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "Content-Type": "application/octet-stream",
            }
            return self._send(200, content, headers)
        if path in ("", "/"):
            return self._send(200, b"hello", {})
        return self._error(404, "RepoNotFound")

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        content = json.dumps({"error": code}).encode()
        headers = {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}
        self._send(status, content, {"Content-Type": "application/json", **headers})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
