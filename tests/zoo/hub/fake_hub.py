"""A hub in memory: the endpoints that huggingface_hub uses to list, fetch and push models, and faults to order.

`FakeHub.answer` maps a request to a response. `serve` puts it behind a socket for the real client in its own process;
tests in this process put it behind the client's MockTransport.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"
LARGE = (".onnx", ".safetensors", ".bin")
BLANK = {".gitattributes": b"*.onnx filter=lfs\n"}


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    sent: int | None = None
    """So many bytes of the body are sent before the connection is closed; None is all."""


def error(status: int, code: str, message: str = "") -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message or code}
    return Answer(status, json.dumps({"error": message or code}).encode(), headers)


def as_json(value: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def digest(path: str, content: bytes) -> str:
    """The name of a file's content: SHA-256 of large files, git's of others."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    proposals: int = 0

    def commit(self, files: Mapping[str, bytes], reference: str = "main") -> str:
        seed = json.dumps([sorted((path, digest(path, body)) for path, body in files.items()), len(self.commits)])
        name = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.references[reference] = name
        return name

    def find(self, revision: str) -> str | None:
        found = self.references.get(revision, revision)
        return found if found in self.commits else None

    @property
    def main(self) -> dict[str, bytes]:
        return self.commits[self.references["main"]]


class FakeHub:
    def __init__(self) -> None:
        self.url = "http://hub.test"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.before: Callable[[str, str], Answer | None] = lambda method, path: None
        """May answer in the hub's place, to a method and a path."""
        self.after: Callable[[str, str, Answer], Answer] = lambda method, path, answer: answer
        """May change an answer."""
        self.client: Callable[[], object] = lambda: None
        """Makes the HTTP client that reaches this hub, where it is behind no socket."""

    def put(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> Repository:
        """Make a repository, or a new commit of it."""
        repository = self.repositories.setdefault(name, Repository())
        repository.private = private
        repository.commit({**BLANK, **files})
        return repository

    def asked(self, method: str, part: str) -> list[str]:
        return [path for said, path in self.requests if said == method and part in path]

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        parts = urlsplit(target)
        path, query = parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.requests.append((method, path))
        found = self.before(method, path) or self._answer(method, path, query, headers, body)
        return self.after(method, path, found)

    def _answer(self, method: str, path: str, query: dict[str, str], headers: Mapping[str, str], body: bytes) -> Answer:
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if token not in ("", WRITER, READER):
            return error(401, "", "Invalid credentials in Authorization header")
        if path.startswith("/lfs/"):
            self.objects[path.removeprefix("/lfs/")] = body
            return Answer()
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return as_json({"errors": [], "warnings": []})
        if path == "/api/models":
            return as_json(list(self._listed(query, token)))
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if ".git/info/lfs/objects/batch" in path:
            return self._batch(json.loads(body), token)
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            return self._model(method, f"{owner}/{name}", [unquote(word) for word in rest], query, token, body)
        owner, name, verb, *rest = [*path.strip("/").split("/"), "", ""]
        if verb == "resolve" and rest:
            return self._resolve(
                f"{owner}/{name}", unquote(rest[0]), unquote("/".join(rest[1:])).rstrip("/"), headers, token
            )
        return error(404, "NotFound")

    def _visible(self, name: str, token: str) -> Repository | None:
        found = self.repositories.get(name)
        return None if found is None or (found.private and not token) else found

    def _listed(self, query: dict[str, str], token: str) -> Iterator[dict[str, object]]:
        for name in sorted(self.repositories):
            info = self._info(name, self.repositories[name].references["main"])
            if self._visible(name, token) and name.startswith(query.get("author", "")):
                tags = info["tags"]
                assert isinstance(tags, list)
                if query.get("filter") in (None, *tags):
                    yield info if "full" in query else {key: info[key] for key in ("id", "modelId", "private", "tags")}

    def _info(self, name: str, commit: str) -> dict[str, object]:
        files = self.repositories[name].commits[commit]
        readme = files.get("README.md", b"").decode()
        front = yaml.safe_load(readme.split("---")[1]) if readme.startswith("---") else {}
        return {
            "id": name,
            "modelId": name,
            "sha": commit,
            "private": self.repositories[name].private,
            "tags": front.get("tags", []),
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def _create(self, wanted: dict[str, str], token: str) -> Answer:
        if token != WRITER:
            return error(403 if token else 401, "", "You don't have the rights to create a model under this namespace")
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repositories:
            return error(409, "", "You already created this model repo")
        self.put(name, {}, private=wanted.get("visibility") == "private")
        return as_json({"url": f"{self.url}/{name}"})

    def _batch(self, wanted: dict[str, list[dict[str, object]]], token: str) -> Answer:
        if not token:
            return error(401, "")
        objects = []
        for entry in wanted["objects"]:
            known = entry["oid"] in self.objects
            upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}}
            objects.append({**entry, **({} if known else upload)})
        return as_json({"transfer": "basic", "objects": objects})

    def _model(self, method: str, name: str, rest: list[str], query: dict[str, str], token: str, body: bytes) -> Answer:
        repository = self._visible(name, token)
        if repository is None:
            return error(401 if not token else 404, "RepoNotFound", "Repository not found")
        verb, revision = (rest[0], rest[1]) if rest else ("revision", "main")
        if verb == "branch" and token != WRITER:
            return error(403, "", "Forbidden: you must have write access")
        if verb == "branch":
            repository.references[revision] = repository.references["main"]
            return as_json({})
        commit = repository.find(revision)
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb == "revision":
            return as_json(self._info(name, commit))
        files = repository.commits[commit]
        if verb == "tree":
            return as_json([_tree_entry(path, content) for path, content in sorted(files.items())])
        proposed = query.get("create_pr") == "1"
        if not token or (token == READER and not proposed):
            return error(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        if verb == "preupload":
            return as_json({"files": [_upload_mode(entry["path"], files) for entry in json.loads(body)["files"]]})
        assert (method, verb) == ("POST", "commit")
        return self._commit(name, repository, revision, body, proposed)

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes, proposed: bool) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        head = repository.references[revision]
        files = dict(repository.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", head) != head:
                return error(412, "", "A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            if line["key"] == "deletedFile":
                del files[value["path"]]
        repository.proposals += proposed
        reference = f"refs/pr/{repository.proposals}" if proposed else revision
        commit = repository.commit(files, reference)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}
        if proposed:
            answer["pullRequestUrl"] = f"{self.url}/{name}/discussions/{repository.proposals}"
        return as_json(answer)

    def _resolve(self, name: str, revision: str, path: str, headers: Mapping[str, str], token: str) -> Answer:
        repository = self._visible(name, token)
        if repository is None:
            return error(401 if not token else 404, "RepoNotFound", "Repository not found")
        commit = repository.find(revision)
        if commit is None:
            return error(404, "RevisionNotFound")
        if path not in repository.commits[commit]:
            return Answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = repository.commits[commit][path]
        said = {"X-Repo-Commit": commit, "ETag": f'"{digest(path, content)}"', "Accept-Ranges": "bytes"}
        said["X-Linked-Size"] = str(len(content))
        if wanted := headers.get("range"):
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            said["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return Answer(206, content[first:], said)
        return Answer(200, content, said)


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": digest(".", content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": digest(path, content), "size": len(content), "pointerSize": 134}
    return entry


def _upload_mode(path: str, files: Mapping[str, bytes]) -> dict[str, object]:
    mode: dict[str, object] = {"path": path, "shouldIgnore": False}
    mode["uploadMode"] = "lfs" if path.endswith(LARGE) else "regular"
    if path in files:
        mode["oid"] = digest(path, files[path])
    return mode


@contextmanager
def serve(hub: FakeHub) -> Iterator[str]:
    """Serve a hub on a free port of this machine; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            else:
                body = self.rfile.read(length)
            headers = {key.lower(): value for key, value in self.headers.items()}
            answer = hub.answer(self.command, self.path, headers, body)
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: answer.sent])
            if answer.sent is not None:
                self.close_connection = True

        def _chunk(self) -> bytes:
            size = int(self.rfile.readline(), 16)
            content = self.rfile.read(size)
            self.rfile.readline()
            return content

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
