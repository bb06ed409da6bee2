"""A hub on this machine: the HTTP endpoints of huggingface.co that downloads and uploads use, over files in memory.

What it speaks was read off the requests of huggingface_hub 2.4 (LFS transfer; the Xet protocol is not spoken).
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from hub_state import LARGE, Hub, Repository, entry, git_sha1, sibling


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_of_this_process() -> Iterator[Hub]:
    """Serve, and let huggingface_hub in this process ask here: it has read the environment already."""
    from unittest.mock import patch

    from huggingface_hub import constants

    with serve() as hub:
        here = {
            "ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        }  # fmt: skip
        with patch.multiple(constants, **here):
            yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.requests.append((self.command, path, dict(self.headers)))
        if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send(401, {"error": "Invalid username or password."}, {"X-Error-Message": "who are you?"})
        elif path.startswith("/objects/"):
            self.hub.objects[path.split("/")[2]] = self.body
            self._send(200, {})
        elif path == "/api/repos/create":
            self._create(json.loads(self.body))
        elif path == "/api/validate-yaml":  # a card, before it is pushed
            self._send(200, {"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(self.body))
        elif path.startswith("/api/") and path.count("/") < 4:
            self._send(404, {"error": f"this hub does not speak {path}"})
        elif path.startswith("/api/"):
            _, _, kind, user, name, *rest = path.split("/")
            self._api(kind, f"{user}/{name}", rest)
        else:
            self._file(path)

    def _create(self, asked: dict) -> None:
        key = (f"{asked.get('type', 'model')}s", f"{asked.get('organization') or 'me'}/{asked['name']}")
        if key in self.hub.repositories:
            self._send(409, {"error": "there already", "url": f"{self.hub.url}/datasets/{key[1]}"})
            return
        self.hub.repositories[key] = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[key].commit("main", {".gitattributes": b"*.parquet filter=lfs\n"})
        self._send(200, {"url": f"{self.hub.url}/datasets/{key[1]}", "name": key[1]})

    def _batch(self, asked: dict) -> None:
        objects = []
        for item in asked["objects"]:
            href = f"{self.hub.url}/objects/{item['oid']}"
            missing = {} if item["oid"] in self.hub.objects else {"actions": {"upload": {"href": href, "header": {}}}}
            objects.append({**item, **missing})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _api(self, kind: str, name: str, rest: list[str]) -> None:
        repository = self.hub.repositories.get((kind, name))
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.resolve(revision) if repository else None
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["branch"]:
            start = json.loads(self.body).get("startingPoint", repository.branches["main"])
            self._send(409 if revision in repository.branches else 200, {})
            repository.branches.setdefault(revision, start)
        elif rest[:1] == ["commits"]:
            about = {"title": "", "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
            self._send(200, [{"id": sha, **about} for sha in reversed(repository.commits)])
        elif commit is None:
            self._send(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            self._send(200, [entry(path, data) for path, data in repository.commits[commit].items()])
        elif rest[:1] == ["preupload"]:
            self._preupload(repository.commits[commit])
        elif rest[:1] == ["commit"]:
            self._commit(name, repository, revision, repository.commits[commit])
        else:
            siblings = [sibling(path, data) for path, data in repository.commits[commit].items()]
            self._send(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings})

    def _preupload(self, there: dict[str, bytes]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": self._oid(file["path"], there.get(file["path"])),
            }
            for file in json.loads(self.body)["files"]
        ]
        self._send(200, {"files": files})

    def _oid(self, path: str, data: bytes | None) -> str | None:
        if data is None:
            return None
        return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else git_sha1(data)

    def _commit(self, name: str, repository: Repository, branch: str, there: dict[str, bytes]) -> None:
        files = dict(there)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = repository.commit(branch, files)
        self._send(200, {"commitUrl": f"{self.hub.url}/datasets/{name}/commit/{sha}", "commitOid": sha})

    def _file(self, path: str) -> None:
        kind = "datasets" if path.startswith("/datasets/") else "models"
        user, name, _, revision, file = path.removeprefix("/datasets").lstrip("/").split("/", 4)
        repository = self.hub.repositories[kind, f"{user}/{name}"]
        commit = repository.resolve(revision)
        assert commit is not None
        data = repository.commits[commit].get(file)
        if data is None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(data).hexdigest() if file.endswith(LARGE) else git_sha1(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if file in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send_file(file, data, headers)

    def _send_file(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        status, start = 200, 0
        if (wanted := self.headers.get("Range")) is not None:
            status, start = 206, int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file in self.hub.drops:
            self.wfile.write(data[start : start + self.hub.drops.pop(file)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data[start:])

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
