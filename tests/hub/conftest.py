"""A Hub in memory, on the loopback interface, and clients in processes of their own that talk to it.

It is this project's model of the Hub: what huggingface_hub asks for when it uploads, lists and downloads.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """Repositories in memory: "models/org/name" → files; every change is a commit."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, int] = {}
        self.uploads: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.tags: dict[str, dict[str, str]] = {}  # of a repository: tag → commit
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self):
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def put(self, key, path, content):
        """Store a file, as a person would through the website."""
        self.repositories.setdefault(key, {})[path] = content
        self.commits[key] = self.commits.get(key, 0) + 1

    def put_folder(self, key, folder):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(key, path.relative_to(folder).as_posix(), path.read_bytes())

    def head(self, key):
        return hashlib.sha1(f"{key} {self.commits.get(key, 0)}".encode()).hexdigest()

    # --- what the client asks ---------------------------------------------------------------------------

    def answer(self, method, path, body):
        """Return (status, headers, content) of a request."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return _json({"name": "org", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if parts[0] == "blobs":
            self.uploads[parts[1]] = body
            return _json({})
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self._batch(json.loads(body))
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            return self._api(method, f"{parts[1]}/{parts[2]}/{parts[3]}", parts[4:], body)
        kind, parts = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve(f"{kind}/{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
        return _json({"error": f"nothing at {method} {path}"}, 404)

    def _create(self, wanted):
        key = f"{wanted.get('type', 'model')}s/{wanted.get('organization', 'org')}/{wanted['name']}"
        if key in self.repositories:
            return _json({"error": "exists", "url": f"{self.url}/{key.removeprefix('models/')}"}, 409)
        self.repositories[key] = {}
        self.private |= {key} if wanted.get("private") or wanted.get("visibility") == "private" else set()
        name = key.partition("/")[2]
        return _json({"url": f"{self.url}/{key.removeprefix('models/')}", "name": name, "id": name})

    def _batch(self, wanted):
        objects = []
        for item in wanted["objects"]:
            known = any(
                hashlib.sha256(content).hexdigest() == item["oid"]
                for files in self.repositories.values()
                for content in files.values()
            )
            actions = {} if known else {"actions": {"upload": {"href": f"{self.url}/blobs/{item['oid']}"}}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        return _json({"transfer": "basic", "objects": objects})

    def _api(self, method, key, rest, body):
        if key not in self.repositories:
            return _json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if rest and rest[0] == "branch":
            branch = f"{key}@{rest[1]}"
            known = branch in self.repositories
            self.repositories.setdefault(branch, dict(self.repositories[key]))
            return _json({"error": "exists"}, 409) if known else _json({}, 201)
        if rest and rest[0] == "tag" and method == "DELETE":
            known = self.tags.get(key, {}).pop(rest[1], None) is not None
            return _json({}) if known else _json({"error": "no tag"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if rest and rest[0] == "tag":
            self.tags.setdefault(key, {})[json.loads(body)["tag"]] = rest[1]
            return _json({}, 201)
        if len(rest) > 1 and f"{key}@{rest[1]}" in self.repositories:
            key = f"{key}@{rest[1]}"
        files = self.repositories[key]
        if rest and rest[0] == "preupload":
            rows = [
                {
                    "path": row["path"],
                    "uploadMode": "lfs" if row["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for row in json.loads(body)["files"]
            ]
            return _json({"files": rows})
        if rest and rest[0] == "commit":
            return self._commit(key, body)
        if rest and rest[0] == "tree":
            prefix = "/".join(rest[2:])
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
                for path, content in sorted(files.items())
                if path.startswith(prefix)
            ]
            return _json(rows)
        if rest and rest[0] == "paths-info":
            wanted = json.loads(body)["paths"]
            rows = [
                {"type": "file", "path": path, "size": len(files[path]), "oid": _git_oid(files[path])}
                for path in wanted
                if path in files
            ]
            return _json(rows)
        if rest and rest[0] == "revision" and rest[1] not in ("main", self.head(key), key.partition("@")[2]):
            return _json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        name = key.partition("/")[2].partition("@")[0]
        siblings = [{"rfilename": path} for path in sorted(files)]
        return _json({"id": name, "modelId": name, "sha": self.head(key), "private": False, "siblings": siblings})

    def _commit(self, key, body):
        files = self.repositories[key]
        for line in body.decode().splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                assert row["value"]["encoding"] == "base64"
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                oid = row["value"]["oid"]
                known = {hashlib.sha256(content).hexdigest(): content for content in files.values()} | self.uploads
                files[row["value"]["path"]] = known[oid]
            elif row["key"] == "deletedFile":
                del files[row["value"]["path"]]
        self.commits[key] = self.commits.get(key, 0) + 1
        url = f"{self.url}/{key.removeprefix('models/')}/commit/{self.head(key)}"
        return _json({"commitUrl": url, "commitOid": self.head(key), "success": True})

    def _resolve(self, key, revision, path):
        if key not in self.repositories:
            return _json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if f"{key}@{revision}" in self.repositories:
            key = f"{key}@{revision}"
        elif revision not in ("main", self.head(key)):
            return _json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": self.head(key)}
        content = self.repositories[key].get(path)
        if content is None:
            return _json({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest()
        return 200, headers | {"ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}, content

    def _handler(hub):  # noqa: N805  (the handler's own `self` is another)
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urlsplit(self.path).path
                hub.requests.append(f"{self.command} {path}")
                status, headers, content = hub.answer(self.command, path, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

            def log_message(self, *args):
                pass

        return Handler


def _json(value, status=200, headers=None):
    return status, {"Content-Type": "application/json"} | (headers or {}), json.dumps(value).encode()


def _git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(scope="module")
def hub():
    """A running Hub, empty."""
    server = Hub()
    yield server
    server.stop()


class Said(dict):
    """What the parts of a process reported; looking at one that ended with an error fails with its traceback."""

    def __getitem__(self, part):
        said = super().__getitem__(part)
        if isinstance(said, dict) and "failed" in said:
            pytest.fail(said["failed"])
        return said


RUNNER = """
import json, traceback
begin, parts, output = json.load(open({job!r}))
names = {{}}
exec(begin, names)
said = {{}}
for part, code in parts.items():
    own = dict(names, report=lambda value, part=part: said.update({{part: value}}))
    try:
        exec(code, own)
    except Exception:
        said[part] = {{"failed": traceback.format_exc()}}
json.dump(said, open(output, "w"))
"""


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Return a function that runs parts of Python code against the Hub, one after the other in one new process.

    Importing takes most of a process's time. It takes the code that all parts begin with and the parts by name, and
    returns by name what each gave to `report(...)`.
    """
    return runner(hub.url, tmp_path_factory.mktemp("client"))


@pytest.fixture
def new_hub():
    """A running Hub, empty, for one test."""
    server = Hub()
    yield server
    server.stop()


@pytest.fixture
def new_client(new_hub, tmp_path):
    """Return a function that runs code against the Hub of one test, in a process of its own; see `client`."""
    run = runner(new_hub.url, tmp_path)
    return lambda code: run("", code=code)["code"]


def runner(url, folder):
    """Return the function that `client` describes, for processes that work in a folder."""
    home = folder / "hf_home"

    def run(begin, **parts):
        environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_TOKEN": "any",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        for name in (
            "HF_HUB_OFFLINE",
            "HF_HUB_CACHE",
            "HF_DATASETS_CACHE",
            "TRANSFORMERS_OFFLINE",
            "HF_DATASETS_OFFLINE",
        ):
            environment.pop(name, None)
        job, output = folder / "job.json", folder / "said.json"
        output.unlink(missing_ok=True)
        job.write_text(json.dumps([begin, parts, str(output)]))
        code = RUNNER.format(job=str(job))
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return Said(json.loads(output.read_text()))

    return run
