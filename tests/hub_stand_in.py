"""A stand-in of the Hugging Face Hub on 127.0.0.1: the HTTP interface that huggingface_hub uses for model repos.

It speaks create_repo, validate-yaml, preupload, the LFS batch interface (PUT and verify), commits as NDJSON, branches,
repo info and resolve. What is uploaded is checked against its stated hash. Xet, its other storage protocol, is left
out: set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"


@dataclass
class Repo:
    """Commits ``{oid: {path: (is LFS, contents or LFS oid)}}``, oldest first, and what each branch points to."""

    commits: dict[str, dict[str, tuple[bool, bytes | str]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, branch: str, files: dict, message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubStandIn:
    """Serves until `close`. `url` is what HF_ENDPOINT should be; `calls` lists ``METHOD path`` of every request."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS contents by sha256
        self.calls: list[str] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}/lfs"  # another host, as the Hub's: clients treat it differently
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str | None = None, text: str = "", **headers: str):
        super().__init__(text)
        named = {"X-Error-Code": code} if code else {}
        self.status, self.text, self.headers = status, text, {**named, "X-Error-Message": text, **headers}


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    # ---------------------------------------------------------------- requests
    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        hub.calls.append(f"{self.command} /{path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        try:
            self._route(path.split("/"))
        except _Refused as refused:
            self._answer(refused.status, {"error": refused.text}, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "repos", "create"]:
                self._create(json.loads(self.body))
            case ["api", "validate-yaml"]:
                self._validate(json.loads(self.body)["content"])
            case ["api", "models", owner, name, "preupload", revision]:
                self._preupload(self._repo(owner, name), revision)
            case ["api", "models", owner, name, "commit", revision]:
                self._commit(self._repo(owner, name), revision, f"{owner}/{name}")
            case ["api", "models", owner, name, "branch", branch]:
                repo = self._repo(owner, name)
                start = json.loads(self.body or b"{}").get("startingPoint", "main")
                repo.branches[branch] = self._found(repo, start)
                self._answer(200, {})
            case ["api", "models", owner, name, *rest]:
                repo = self._repo(owner, name)
                oid = self._found(repo, rest[1] if rest else "main")
                files = [{"rfilename": path} for path in repo.commits[oid]]
                self._answer(
                    200, {"_id": "0", "id": f"{owner}/{name}", "sha": oid, "siblings": files, "private": False}
                )
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._repo(owner, name.removesuffix(".git"))
                self._batch(json.loads(self.body)["objects"])
            case ["lfs", oid]:
                self._object(oid)
            case ["lfs", oid, "verify"]:
                asked = json.loads(self.body)
                if asked["oid"] != oid or asked["size"] != len(self.hub.objects.get(oid, b"")):
                    raise _Refused(404, text=f"object {oid} of {asked['size']} bytes was not uploaded")
                self._answer(200, {})
            case [owner, name, "resolve", revision, *file]:
                self._resolve(self._repo(owner, name), revision, "/".join(file))
            case _:
                raise _Refused(404, text=f"the stand-in does not know {self.command} /{'/'.join(parts)}")

    # ---------------------------------------------------------------- writing
    def _create(self, asked: dict) -> None:
        self._check_login()
        owner = asked.get("organization") or "someone"
        repo_id = f"{owner}/{asked['name']}"
        known = repo_id in self.hub.repos
        if not known:
            repo = self.hub.repos[repo_id] = Repo()
            repo.commit("main", {".gitattributes": (False, b"*.safetensors filter=lfs\n")}, "initial commit")
        self._answer(409 if known else 200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def _validate(self, content: str) -> None:
        """The metadata block must be YAML, and base_model a repo id, as the Hub has it."""
        try:
            metadata = yaml.safe_load(content.split("---\n")[1])
            errors = [] if "/" in metadata.get("base_model", "a/b").strip("./") else ['"base_model" is not valid']
        except (IndexError, yaml.YAMLError, AttributeError) as error:
            errors = [str(error)]
        faults = [{"message": text} for text in errors]
        self._answer(400 if faults else 200, {"errors": faults, "warnings": []})

    def _preupload(self, repo: Repo, revision: str) -> None:
        self._check_login()
        known = repo.commits[self._found(repo, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = None if path not in known else _etag(known[path])
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": answers})

    def _batch(self, objects: list[dict]) -> None:
        self._check_login()
        answers = []
        for wanted in objects:
            oid, answer = wanted["oid"], {"oid": wanted["oid"], "size": wanted["size"]}
            if oid not in self.hub.objects:
                place = f"{self.hub.storage}/{oid}"
                answer["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            answers.append(answer)
        self._answer(200, {"transfer": "basic", "objects": answers})

    def _object(self, oid: str) -> None:
        if self.command == "PUT":
            found = hashlib.sha256(self.body).hexdigest()
            if found != oid:
                raise _Refused(400, text=f"sha256 {found} is not the stated {oid}")
            self.hub.objects[oid] = self.body
            self._answer(200, {})
        else:
            self._send(200, self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _commit(self, repo: Repo, revision: str, repo_id: str) -> None:
        self._check_login()
        files = dict(repo.commits[self._found(repo, revision)])
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = (False, base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["algo"] != "sha256" or len(self.hub.objects.get(value["oid"], b"")) != value["size"]:
                    raise _Refused(400, text=f"{value['path']}: object {value['oid']} was not uploaded")
                files[value["path"]] = (True, value["oid"])
            elif kind == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise _Refused(400, text=f"operation {kind} is unknown")
        oid = repo.commit(revision, files, message)
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    # ---------------------------------------------------------------- reading
    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        if repo.gated and not self.known:
            raise _Refused(401, "GatedRepo", "Access to this model is restricted")
        oid = self._found(repo, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in repo.commits[oid]:
            raise _Refused(404, "EntryNotFound", "Entry not found", **headers)
        is_lfs, value = repo.commits[oid][path]
        if not is_lfs:
            assert isinstance(value, bytes)
            self._send(200, value, {**headers, "ETag": f'"{_etag((is_lfs, value))}"'})
            return
        size = str(len(self.hub.objects[str(value)]))
        linked = {"X-Linked-Etag": f'"{value}"', "X-Linked-Size": size, "Location": f"{self.hub.storage}/{value}"}
        self._send(302, b"", {**headers, **linked})

    def _repo(self, owner: str, name: str) -> Repo:
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None:  # the Hub does not tell strangers which repos exist
            raise _Refused(404 if self.known else 401, "RepoNotFound", "Repository not found")
        return repo

    def _found(self, repo: Repo, revision: str) -> str:
        oid = repo.find(revision)
        if oid is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def _check_login(self) -> None:
        if not self.known:
            raise _Refused(401, text="Invalid username or password.")

    def _answer(self, status: int, data: dict, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(entry: tuple[bool, bytes | str]) -> str:
    """An LFS object's sha256, or a git blob's sha1."""
    is_lfs, value = entry
    return str(value) if is_lfs else hashlib.sha1(b"blob %d\0" % len(value) + value).hexdigest()
