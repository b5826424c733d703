"""A server of this machine that stands for the Hugging Face Hub, with what its package asks for to push and to load."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading

import pytest


class Hub:
    """Files by repository, {"OWNER/NAME": {path: content}}, with those of other revisions; and what was asked for."""

    def __init__(self):
        self.repositories, self.private, self.messages, self.asked, self.refused = {}, {}, [], [], 0
        self.revisions = {}  # {(name, revision): files}

    def answer(self, method, path, body):
        """(status, content) of a request; a dict is sent as json."""
        self.asked.append(f"{method} {path}")
        path, _, query = path.partition("?")
        if self.refused:
            return self.refused, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name], self.private[name] = {}, asked.get("private", asked.get("visibility"))
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|preupload|commit|tree)/(\w+)(?:/.*)?)?", path
        ):
            name, what, revision = found.groups()
            if name not in self.repositories:
                return 404, {"error": "Repository not found"}
            files = self.revisions.get((name, revision), self.repositories[name])
            if what == "preupload":
                listed = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                return 200, {"files": listed}
            if what == "commit":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "header":
                        self.messages.append(line["value"]["summary"])
                    else:
                        assert line["value"]["encoding"] == "base64"
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return 200, {"success": True, "commitUrl": f"{self.url}/{name}/commit/abc", "commitOid": "a" * 40}
            if what == "tree":
                listed = {path: (hashlib.sha1(content).hexdigest(), len(content)) for path, content in files.items()}
                return 200, [
                    {"type": "file", "oid": oid, "size": size, "path": path} for path, (oid, size) in listed.items()
                ]
            return 200, {
                "id": name,
                "modelId": name,
                "sha": "a" * 40,
                "siblings": [],
                "tags": [],
                "private": bool(self.private.get(name)),
            }
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            name, revision, file = found.groups()
            files = self.revisions.get((name, revision), self.repositories.get(name, {}))
            if file in files:
                return 200, files[file]
        return 404, {"error": f"not found: {query}"}


@contextlib.contextmanager
def serving():
    """The hub, at an address that huggingface_hub takes for the real one."""
    from huggingface_hub import constants

    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content = hub.answer(self.command, self.path, body)
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = handle_one

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "ENDPOINT", hub.url)
        patched.setattr(constants, "HF_HUB_OFFLINE", False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template[template.index("/{repo_id}") :])
        patched.setenv("HF_TOKEN", "hf_none")
        patched.setenv("NO_PROXY", "127.0.0.1")
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
