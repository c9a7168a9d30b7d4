"""A small Hub on loopback: repos, preupload, LFS, commits, downloads, and faults on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_for_the_test_only"


class Hub(ThreadingHTTPServer):
    """What is stored, and what goes wrong next: ``faults`` is a list of (path pattern, status or "cut")."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.blobs, self.faults, self.puts, self.seen = {}, {}, [], [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def answer(self, method):
        hub = self.server
        hub.seen.append((method, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for fault in hub.faults:
            if re.search(fault[0], self.path) and method in ("POST", "PUT"):
                hub.faults.remove(fault)
                if fault[1] == "cut":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return None
                return self.send({"error": "asked to fail"}, fault[1])
        if not self.path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send({"error": "Invalid username or password."}, 401)
        for pattern, act in (
            (r"/api/repos/create$", self.create),
            (r"/api/validate-yaml$", lambda *_: self.send({"errors": [], "warnings": []})),
            (r"/api/models/(.+)/preupload/.+$", self.preupload),
            (r"/(.+)\.git/info/lfs/objects/batch$", self.batch),
            (r"/lfs/(\w+)$", self.store),
            (r"/api/models/(.+)/commit/([^?]+)", self.commit),
        ):
            match = re.fullmatch(pattern + r"(?:\?.*)?", self.path)
            if match:
                return act(body, *match.groups())
        return self.send({"error": f"no such place: {self.path}"}, 404)

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        status = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(
            name, {"files": {}, "private": bool(asked.get("private") or asked.get("visibility") == "private")}
        )
        self.send({"url": f"{self.server.url}/{name}", "name": name}, status)

    def preupload(self, body, repo):
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self.send({"files": files})

    def batch(self, body, repo):
        objects = []
        for one in json.loads(body)["objects"]:
            there = one["oid"] in self.server.blobs
            actions = {} if there else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
            objects.append({"oid": one["oid"], "size": one["size"], **actions})
        self.send({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def store(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.puts.append(oid)
        self.server.blobs[oid] = body
        self.send({})

    def commit(self, body, repo, revision):
        files = self.server.repos[repo]["files"]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.blobs[entry["value"]["oid"]]
        made = {"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.server.url}/{repo}/commit/{'c' * 40}"}
        if "create_pr=1" in self.path:
            made["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/1"
        self.send(made)

    def send(self, content, status=200, kind="application/json"):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
