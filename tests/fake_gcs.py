"""A bucket in memory, behind as much of the Cloud Storage JSON API as is used here.

https://cloud.google.com/storage/docs/json_api. Three clients speak to it, each in its
own way: gcsfs (epath's), TensorStore, and google-cloud-storage (Orbax asks it what kind
of bucket this is). Nothing here renames or copies: who asks for that gets an error.
"""

import contextlib
import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "/storage/v1/b/bucket"


class Bucket(http.server.ThreadingHTTPServer):
    """gs://bucket; `objects` is {name: (generation, content)}."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.generations = itertools.count(1)
        self.lock = threading.RLock()

    def environment(self) -> dict[str, str]:
        """What sends the clients of a process here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GCS_TOKEN": "anon",
            # It would ask over gRPC, which is not served here, for the kind of bucket.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """An empty bucket on a free port, until the block ends."""
    with Bucket() as bucket:
        threading.Thread(target=bucket.serve_forever, daemon=True).start()
        yield bucket
        bucket.shutdown()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and content are two packets, of which the second would wait for 40 ms.
    disable_nagle_algorithm = True
    server: Bucket

    def log_message(self, *_):
        """Says nothing."""

    def handle_one_request(self):
        # Clients that are killed do not say goodbye.
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def handle_request(self, method: str):
        url = urlsplit(self.path)
        path = url.path.removeprefix("/upload").removeprefix("/download")
        query = dict(parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = unquote(path.removeprefix(f"{BUCKET}/o/"))
        with self.server.lock:
            if path == BUCKET:
                self.answer(200, {"kind": "storage#bucket", "name": "bucket"})
            elif path == f"{BUCKET}/o" and method == "GET":
                self.answer(200, self.list(query.get("prefix", ""), query))
            elif path == f"{BUCKET}/o":
                self.upload(body, query)
            elif name not in self.server.objects:
                self.answer(404, {"error": {"code": 404, "message": f"no {self.path}"}})
            elif not self.refuse(name, query):
                self.delete(name) if method == "DELETE" else self.get(name, query)

    def do_GET(self):
        self.handle_request("GET")

    def do_POST(self):
        self.handle_request("POST")

    def do_DELETE(self):
        self.handle_request("DELETE")

    def answer(self, status: int, content: object = b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, name: str, query: dict[str, str]) -> bool:
        """Answers a request whose condition on the object's generation fails."""
        generation = self.server.objects.get(name, (0, b""))[0]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            self.answer(412)
        elif int(query.get("ifGenerationNotMatch", -1)) == generation:
            self.answer(304)
        else:
            return False
        return True

    def describe(self, name: str) -> dict[str, str]:
        generation, content = self.server.objects[name]
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def list(self, prefix: str, query: dict[str, str]) -> dict[str, object]:
        """All objects with the prefix, and folders if they are asked for; one page."""
        start, end = query.get("startOffset", ""), query.get("endOffset")
        items, folders = [], set()
        for name in sorted(self.server.objects):
            if name.startswith(prefix) and name >= start and (not end or name < end):
                rest = name[len(prefix) :]
                if query.get("delimiter", "\0") in rest:
                    folders.add(prefix + rest.partition("/")[0] + "/")
                else:
                    items.append(self.describe(name))
        return {"kind": "storage#objects", "prefixes": sorted(folders), "items": items}

    def get(self, name: str, query: dict[str, str]):
        """An object's description, its content, or a range of that."""
        generation, content = self.server.objects[name]
        first, _, last = self.headers.get("Range", "")[len("bytes=") :].partition("-")
        start = int(first) if first else max(0, len(content) - int(last or 1e18))
        stop = min(len(content), int(last) + 1) if first and last else len(content)
        where = f"bytes {start}-{stop - 1}/{len(content)}"
        if query.get("alt") != "media":
            self.answer(200, self.describe(name))
        elif "Range" not in self.headers:
            self.answer(200, content, X_Goog_Generation=generation)
        elif start >= len(content):
            self.answer(416)
        else:
            part = content[start:stop]
            self.answer(206, part, X_Goog_Generation=generation, Content_Range=where)

    def delete(self, name: str):
        del self.server.objects[name]
        self.answer(204)

    def upload(self, body: bytes, query: dict[str, str]):
        """In one request (TensorStore); or first the name, then in parts (gcsfs)."""
        kind, name = query.get("uploadType"), query.get("name")
        if kind == "resumable":
            upload = str(next(self.server.generations))
            self.server.uploads[upload] = name, bytearray()
            there = f"{self.server.url}/upload{BUCKET}/o?upload_id={upload}"
            return self.answer(200, {}, Location=there)
        if kind is None:
            name, before = self.server.uploads[query["upload_id"]]
            before += body
            if self.headers["Content-Range"].endswith("/*"):
                return self.answer(308, Range=f"bytes=0-{len(before) - 1}")
            body = bytes(before)
        if not self.refuse(name, query):
            self.server.objects[name] = next(self.server.generations), body
            self.answer(200, self.describe(name))
