"""What the hub on this machine holds: repositories, their commits, and the ways in which it is made to fail."""

import hashlib
from dataclasses import dataclass, field

LARGE = (".onnx", ".pt", ".parquet", ".weight")


@dataclass
class Repository:
    """Branches and commits of files; every commit is kept, in order."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        text = branch + repr(sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items()))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The state behind the server, and the ways in which it can be made to fail.

    corrupt: paths of which other bytes are sent than the listing says. drops: path -> number of bytes after which the
    connection is cut, once. token: the only one that is let in, or None. requests: (method, path, headers).
    """

    url: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    drops: dict[str, int] = field(default_factory=dict)
    token: str | None = None
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> str:
        """A repository (kind models or datasets) with one commit on main; returns the commit."""
        return self.repositories.setdefault((kind, name), Repository()).commit("main", files)

    def asked(self, method: str, part: str) -> list[dict[str, str]]:
        """Headers of the requests so far whose path holds `part`."""
        return [headers for verb, path, headers in self.requests if verb == method and part in path]


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def sibling(path: str, data: bytes) -> dict:
    sibling = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if path.endswith(LARGE):
        sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return sibling
