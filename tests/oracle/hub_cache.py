"""One cache for two libraries: what sconce downloads from a local server that speaks the hub's
protocol, Python's huggingface_hub finds offline, and the other way round.

    python tests/oracle/hub_cache.py target/release/sconce
"""

import hashlib
import http.server
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "none"}', "model.safetensors": bytes(range(256)) * 4000}


def etag(name):
    data = FILES[name]
    if name.endswith("safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        parts = self.path.split("?")[0].strip("/").split("/")
        name = parts[-1]
        hub = parts[:3] == ["owner", "name", "resolve"]
        if name not in FILES or not (hub or parts[0] == "cdn"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = FILES[name]
        large = name.endswith("safetensors")
        if hub and large:
            self.send_response(302)
            self.send_header("X-Linked-Etag", f'"{etag(name)}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn/{name}")
            data = b""
        else:
            asked = self.headers.get("Range", "bytes=0-")
            start = int(asked.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            data = data[start:]
            self.send_header("ETag", f'"{etag(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def python(code, environment):
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def main():
    binary = sys.argv[1]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    get = "from huggingface_hub import hf_hub_download as get; print(get('owner/name', '{}'))"
    with tempfile.TemporaryDirectory() as folder:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}

        def environment(cache, offline):
            endpoint = "http://127.0.0.1:1" if offline else f"http://127.0.0.1:{server.server_port}"
            more = {"HF_HUB_OFFLINE": "1"} if offline else {}
            return clean | {"HF_HOME": f"{folder}/{cache}", "HF_ENDPOINT": endpoint} | more

        def sconce(cache, offline):
            done = subprocess.run([binary, "download", "hub:owner/name"], capture_output=True,
                                  text=True, env=environment(cache, offline))  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        sconce("ours", False)
        for name, data in FILES.items():
            path = python(get.format(name), environment("ours", True))
            assert Path(path).read_bytes() == data, name
        print("huggingface_hub, offline, reads what sconce stored")
        for name in FILES:
            python(get.format(name), environment("theirs", False))
        assert Path(sconce("theirs", True)).read_bytes() == FILES["model.safetensors"]
        print("sconce, offline, reads what huggingface_hub stored")
        listing = lambda cache: sorted(
            str(p.relative_to(f"{folder}/{cache}/hub/models--owner--name"))
            for p in Path(f"{folder}/{cache}/hub/models--owner--name").rglob("*")
            if ".no_exist" not in p.parts
        )
        assert listing("ours") == listing("theirs"), (listing("ours"), listing("theirs"))
        print("both caches hold the same files")


if __name__ == "__main__":
    main()
