"""A small Hub over loopback HTTP, from the standard library, for the real huggingface_hub client.

It keeps commits, branches, tags, pull requests, LFS objects and private repositories in memory, serves ranges, refuses
a commit whose parent has moved on, and can be told to drop connections, to cut bodies short, to ignore ranges, and to
redirect to a storage on another host.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_token_of_the_tests"
LFS = re.compile(r".*\.(safetensors|bin|pt|parquet)$")
_KINDS = {"models": "model", "datasets": "dataset"}


class Refused(Exception):
    """An answer other than 200: status, the Hub's error code, a message."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message or code or "refused"


@dataclass
class Repo:
    """Commits (sha -> path -> content, with "lfs" where it is an LFS object) and what points to them."""

    private: bool
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, tuple[bytes, bool]]) -> str:
        contents = sorted((path, hashlib.sha256(data).hexdigest()) for path, (data, _) in files.items())
        sha = hashlib.sha1(f"{len(self.order)} {ref} {contents}".encode()).hexdigest()
        self.commits[sha] = files
        self.order.append(sha)
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        found = self.refs.get(revision) or self.tags.get(revision)
        if found is None and revision in self.commits:
            found = revision
        if found is None:
            raise Refused(404, "RevisionNotFound", f"no revision {revision}")
        return found


class Hub:
    """The server, running from the moment it is made.

    Attributes:
        url (`str`): what HF_ENDPOINT must be.
        requests: (method, path, bytes of body sent) of every request.
        fault: called with (method, path); returns None, "drop" (close without an answer), or a number of bytes after
            which a body is cut and the connection closed.
        before_commit: called with the repository before a commit is applied: a place for others to be faster.
        done: called with (method, path) when a request has had its effect and before it is answered.
        ranges: whether byte ranges are served; if not, every answer is the whole file.
        storage: whether LFS files lie on another host, to which signed addresses lead that are good for one signature.
        signature: the one that is accepted now; a changed one makes earlier addresses expire.
        served: called with (path, content of the file); returns what is sent in its place.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.fault: Callable[[str, str], str | int | None] = lambda method, path: None
        self.before_commit: Callable[[Repo], None] = lambda repo: None
        self.done: Callable[[str, str], None] = lambda method, path: None
        self.served: Callable[[str, bytes], bytes] = lambda path, data: data
        self.ranges, self.storage, self.signature = True, False, 0
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        serve = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        serve.start()

    def repo(self, name: str, kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Path -> content at a revision."""
        repo = self.repo(name, kind)
        return {path: content for path, (content, _) in repo.commits[repo.resolve(revision)].items()}

    def put(self, name: str, files: dict[str, bytes], kind: str = "model", private: bool = False) -> str:
        """Commit files without the client, as another user would; return the commit."""
        repo = self.repos.setdefault((kind, name), Repo(private))
        old = repo.commits[repo.refs["main"]] if "main" in repo.refs else {}
        return repo.commit("main", old | {path: (data, bool(LFS.match(path))) for path, data in files.items()})

    def sent(self, pattern: str = "") -> int:
        """Bytes of bodies sent for paths that match."""
        return sum(size for method, path, size in self.requests if method == "GET" and re.search(pattern, path))

    def count(self, method: str, pattern: str = "") -> int:
        return sum(1 for verb, path, _ in self.requests if verb == method and re.search(pattern, path))

    def reset(self) -> None:
        self.requests.clear()
        self.fault = lambda method, path: None
        self.before_commit = lambda repo: None
        self.done = lambda method, path: None
        self.served = lambda path, data: data
        self.ranges, self.storage, self.signature = True, False, 0


class _Server(ThreadingHTTPServer):
    hub: Hub
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in the middle are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.cut: int | None = None
        fault = hub.fault(self.command, self.path)
        if fault == "drop":
            hub.requests.append((self.command, self.path, 0))
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.cut = fault
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if not self._chunked() else self._chunks()
        try:
            with hub.lock:
                reply = self._route(unquote(url.path), url.path, body)
            hub.done(self.command, self.path)
        except Refused as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)
            return
        if isinstance(reply, tuple):
            self._send(*reply)
        else:
            self._send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    def _chunked(self) -> bool:
        return "chunked" in self.headers.get("Transfer-Encoding", "")

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        shown = body if self.command != "HEAD" else b""
        if self.cut is not None and len(shown) > self.cut:
            shown = shown[: self.cut]
            self.close_connection = True
        self.server.hub.requests.append((self.command, self.path, len(shown)))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(shown)

    def _trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _route(self, path: str, raw: str, body: bytes) -> Any:
        if path.startswith("/lfs/") and self.command == "PUT":
            return self._store(path.removeprefix("/lfs/"), body)
        if path.startswith("/storage/"):
            return self._stored(path.removeprefix("/storage/"))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/whoami-v2":
            return {"name": "me", "type": "user", "orgs": []}
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._open("dataset" if match[1] else "model", match[2])
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", raw):
            repo = self._open("dataset" if match[1] else "model", unquote(match[2]))
            return self._file(repo, unquote(match[3]), unquote(match[4]))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?", raw):
            kind, name, verb, revision, rest = match.groups()
            repo = self._open(_KINDS[kind], name)
            handler = getattr(self, f"_api_{(verb or 'revision').replace('-', '_')}", None)
            if handler is not None:
                return handler(repo, name, unquote(revision or "main"), unquote(rest or ""), body)
        raise Refused(404, "", f"no route {path}")

    def _open(self, kind: str, name: str) -> Repo:
        repo = self.server.hub.repos.get((kind, name))
        if repo is None:
            raise Refused(404 if self._trusted() else 401, "RepoNotFound", f"no {kind} {name}")
        if repo.private and not self._trusted():
            raise Refused(401, "RepoNotFound", f"no {kind} {name}")
        return repo

    def _writer(self) -> None:
        if not self._trusted():
            raise Refused(401, "", "Invalid username or password.")

    def _create(self, wanted: dict[str, Any]) -> Any:
        self._writer()
        kind, name = wanted.get("type", "model"), f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.server.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.server.hub.repos:
            return 409, json.dumps({"url": url, "error": "exists"}).encode(), {}
        private = wanted.get("private", False) or wanted.get("visibility") == "private"
        self.server.hub.repos[kind, name] = repo = Repo(bool(private))
        repo.commit("main", {})
        return {"url": url, "id": name, "name": name}

    def _store(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(422, "", "the object is not what it was announced as")
        self.server.hub.objects[oid] = body
        return {}

    def _batch(self, wanted: dict[str, Any]) -> Any:
        self._writer()
        found = []
        for item in wanted["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.hub.url}/lfs/{item['oid']}"}}
            found.append(entry)
        return {"transfer": "basic", "objects": found}

    def _file(self, repo: Repo, revision: str, path: str) -> Any:
        commit = repo.resolve(revision)
        if path not in repo.commits[commit]:
            raise Refused(404, "EntryNotFound", f"no file {path}")
        data, lfs = repo.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(data, lfs)}"', "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        if lfs and self.server.hub.storage:
            self.server.hub.objects[_oid(data, lfs)] = data
            address = f"http://localhost:{self.server.server_port}/storage/{_oid(data, lfs)}"
            return 302, b"", headers | {"Location": f"{address}?signature={self.server.hub.signature}"}
        return self._part(data, headers)

    def _stored(self, oid: str) -> Any:
        """Serve an object as a storage does, which wants a signature and refuses a second way to be let in."""
        if self.headers.get("Authorization") is not None:
            raise Refused(400, "", "only one way to authenticate is allowed")
        if self.query.get("signature") != [str(self.server.hub.signature)]:
            raise Refused(403, "", "the address has expired")
        return self._part(self.server.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _part(self, data: bytes, headers: dict[str, str]) -> Any:
        """Answer with the range of bytes that was asked for, or all."""
        data = self.server.hub.served(self.path, data)
        if not self.server.hub.ranges:
            return 200, data, headers
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return 200, data, headers
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if first > last:
            return 416, b"", headers | {"Content-Range": f"bytes */{len(data)}"}
        return 206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}

    def _api_revision(self, repo: Repo, name: str, revision: str, rest: str, body: bytes) -> Any:
        if self.command == "DELETE":
            raise Refused(405)
        commit = repo.resolve(revision)
        return {
            "id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": [],
            "siblings": [{"rfilename": path} for path in repo.commits[commit]],
        }  # fmt: skip

    def _api_tree(self, repo: Repo, name: str, revision: str, rest: str, body: bytes) -> Any:
        files = repo.commits[repo.resolve(revision)]
        inside = {path: value for path, value in files.items() if not rest or path.startswith(rest + "/")}
        if rest and not inside:
            raise Refused(404, "EntryNotFound", f"no folder {rest}")
        if self.query.get("recursive", [""])[0].lower() in ("true", "1"):
            return [_entry(path, *value) for path, value in inside.items()]
        above = f"{rest}/" if rest else ""
        here = {path: path.removeprefix(above).partition("/") for path in inside}
        folders = {above + name for name, slash, _ in here.values() if slash}
        shown = [_entry(path, *inside[path]) for path, (_, slash, _) in here.items() if not slash]
        return shown + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]

    def _api_paths_info(self, repo: Repo, name: str, revision: str, rest: str, body: bytes) -> Any:
        files = repo.commits[repo.resolve(revision)]
        form = json.loads(body) if body[:1] == b"{" else parse_qs(body.decode())
        return [_entry(path, *files[path]) for path in form["paths"] if path in files]

    def _api_preupload(self, repo: Repo, name: str, revision: str, rest: str, body: bytes) -> Any:
        self._writer()
        files = repo.commits[repo.resolve(revision)]
        found = []
        for item in json.loads(body)["files"]:
            lfs = bool(LFS.match(item["path"])) or item["size"] > 10 << 20
            entry = {"path": item["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if item["path"] in files:
                entry["oid"] = _oid(*files[item["path"]])
            found.append(entry)
        return {"files": found}

    def _api_commit(self, repo: Repo, name: str, revision: str, rest: str, body: bytes) -> Any:
        self._writer()
        self.server.hub.before_commit(repo)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        parent = repo.resolve(revision)
        wanted = next(line["value"] for line in lines if line["key"] == "header").get("parentCommit")
        proposal = self.query.get("create_pr") == ["1"]
        if wanted is not None and wanted != parent and not proposal:
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for line in lines:
            self._apply(files, line["key"], line["value"])
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        commit = repo.commit(f"refs/pr/{number}" if proposal else revision, files)
        url = f"{self.server.hub.url}/{name}"
        return {
            "commitOid": commit, "commitUrl": f"{url}/commit/{commit}", "success": True,
            "pullRequestUrl": f"{url}/discussions/{number}" if proposal else None,
        }  # fmt: skip

    def _apply(self, files: dict[str, tuple[bytes, bool]], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = (base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            files[value["path"]] = (self.server.hub.objects[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]

    def _api_tag(self, repo: Repo, name: str, revision: str, rest: str, body: bytes) -> Any:
        self._writer()
        repo.tags[json.loads(body)["tag"]] = repo.resolve(revision)
        return {}

    def _api_branch(self, repo: Repo, name: str, branch: str, rest: str, body: bytes) -> Any:
        self._writer()
        repo.refs[branch] = repo.resolve(json.loads(body or b"{}").get("startingPoint") or "main")
        return {}

    def _api_refs(self, repo: Repo, name: str, revision: str, rest: str, body: bytes) -> Any:
        def shown(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": sha} for ref, sha in refs.items()]

        branches = {ref: sha for ref, sha in repo.refs.items() if not ref.startswith("refs/")}
        return {"branches": shown("heads", branches), "tags": shown("tags", repo.tags), "converts": []}


def _oid(data: bytes, lfs: bool) -> str:
    """As the Hub names contents: sha256 of an LFS object, git's sha1 of a plain file."""
    if lfs:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes, lfs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _oid(data, False)}
    if lfs:
        entry["lfs"] = {"oid": _oid(data, True), "size": len(data), "pointerSize": 134}
    return entry


HUB = Hub()
