"""A small Hub on loopback: repos, preupload, LFS, commits, downloads, and faults on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_for_the_test_only"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """What is stored, and what goes wrong next: ``faults`` is a list of (path pattern, status or "cut").

    ``heads`` are the commits of repos; ``meanwhile`` holds what others do just before the next commit arrives.
    ``sent`` counts the bytes of each stored file that went out; ``ranges`` says whether byte ranges are understood.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.blobs, self.faults, self.puts, self.seen = {}, {}, [], [], []
        self.heads, self.meanwhile = {}, []
        self.sent, self.ranges = Counter(), True
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def publish(self, repo, folder):
        """Have a repo that holds the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos[repo] = {"files": files, "private": False}
        self.blobs.update({hashlib.sha256(data).hexdigest(): data for data in files.values()})

    def head(self, repo):
        return self.heads.get(repo, COMMIT)

    def change(self, repo, files):
        """Have somebody commit files (None: without them) to a repo."""
        there = self.repos[repo]["files"]
        for name, content in files.items():
            there.pop(name, None) if content is None else there.update({name: content})
        self.heads[repo] = hashlib.sha1(f"{self.head(repo)}".encode()).hexdigest()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def cdn(self):
        return f"http://localhost:{self.server_port}"


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
            if re.search(fault[0], self.path):
                hub.faults.remove(fault)
                if fault[1] == "cut":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return None
                if fault[1] == "page":
                    return self.send_page()
                return self.send({"error": "asked to fail"}, fault[1])
        if not self.path.startswith(("/lfs/", "/cdn/")) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send({"error": "Invalid username or password."}, 401)
        for pattern, act in (
            (r"/api/repos/create$", self.create),
            (r"/api/validate-yaml$", lambda *_: self.send({"errors": [], "warnings": []})),
            (r"/api/models/(.+)/preupload/.+$", self.preupload),
            (r"/(.+)\.git/info/lfs/objects/batch$", self.batch),
            (r"/lfs/(\w+)$", self.store),
            (r"/api/models/(.+)/commit/([^?]+)", self.commit),
            (r"/api/models/(.+)/revision/([^?]+)", self.info),
            (r"/api/models/([^/]+/[^/?]+)", self.info),
            (r"/api/models/(.+)/tree/([^?]+)", self.tree),
            (r"/([\w-]+/[\w.-]+)/resolve/(\w+)/([^?]+)", self.resolve),
            (r"/cdn/(\w+)/([^?]+)", self.deliver),
        ):
            match = re.fullmatch(pattern + r"(?:\?.*)?", self.path)
            if match:
                return act(body, *match.groups())
        return self.send({"error": f"no such place: {self.path}"}, 404)

    def send_page(self):
        """Answer as a proxy that wants a login does."""
        page = b"<!doctype html><html><body>Sign in to the network</body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

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
        if self.server.meanwhile:
            self.server.meanwhile.pop(0)()
        files = self.server.repos[repo]["files"]
        lines = [json.loads(line) for line in body.decode().splitlines()]
        if lines[0]["value"].get("parentCommit", self.server.head(repo)) != self.server.head(repo):
            return self.send({"error": "A commit has happened since. Please refresh and try again."}, 412)
        for entry in lines:
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.blobs[entry["value"]["oid"]]
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        self.server.change(repo, {})
        head = self.server.head(repo)
        made = {"success": True, "commitOid": head, "commitUrl": f"{self.server.url}/{repo}/commit/{head}"}
        if "create_pr=1" in self.path:
            made["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/1"
        return self.send(made)

    def info(self, body, repo, revision="main"):
        if repo not in self.server.repos or revision not in ("main", self.server.head(repo)):
            return self.send({"error": "Repository not found"}, 404)
        siblings = [
            {
                "rfilename": path,
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
                **self.large(path, data),
            }
            for path, data in self.files(repo).items()
        ]
        return self.send({"id": repo, "modelId": repo, "sha": self.server.head(repo), "siblings": siblings, "tags": []})

    def tree(self, body, repo, revision):
        entries = []
        for path, data in self.server.repos[repo]["files"].items():
            entry = {"type": "file", "oid": "0" * 40, "size": len(data), "path": path}
            entries.append(entry | self.large(path, data))
        self.send(entries)

    def files(self, repo):
        return self.server.repos[repo]["files"]

    def large(self, path, data):
        """What the Hub tells of a file that is kept apart."""
        digest = hashlib.sha256(data).hexdigest()
        told = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 134}
        return {"lfs": told} if path.endswith(".safetensors") else {}

    def resolve(self, body, repo, revision, path):
        """Weights are sent from another place, as the Hub does."""
        data = self.server.repos.get(repo, {"files": {}})["files"].get(path)
        if data is None:
            return self.send({"error": "Entry not found"}, 404)
        oid = hashlib.sha256(data).hexdigest()
        told = {
            "X-Repo-Commit": self.server.head(repo),
            "ETag": f'"{oid}"',
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": len(data),
        }
        if not path.endswith(".safetensors"):
            return self.send_data(data, path, told)
        return self.send_data(b"", path, {**told, "Location": f"{self.server.cdn}/cdn/{oid}/{path}"}, 302)

    def deliver(self, body, oid, path):
        self.send_data(self.server.blobs[oid], path, {"ETag": f'"{oid}"'})

    def send_data(self, data, path, headers, status=200):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and self.server.ranges and status == 200:
            start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            data = data[start:stop]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent[path] += len(data)
            self.wfile.write(data)

    def send(self, content, status=200, kind="application/json"):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
