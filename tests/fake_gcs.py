"""A bucket in memory, behind as much of the Cloud Storage JSON API as clients here use.

https://cloud.google.com/storage/docs/json_api. Three clients speak to it, each in its
own way: gcsfs (epath's, for small files), TensorStore (features, checkpoints) and
google-cloud-storage (Orbax asks what kind of bucket it is). There is no call that
renames or copies: who asks for one gets an error.
"""

import contextlib
import email
import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "bucket"


class Bucket(http.server.ThreadingHTTPServer):
    """Serves itself; `objects` is {name: (generation, content)}."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.generations = itertools.count(1)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def names(self, prefix: str = "") -> list[str]:
        """Of the objects whose name begins so."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def environment(self) -> dict[str, str]:
        """What sends each of the clients here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GCS_TOKEN": "anon",
            # Kinds of buckets that are asked for over gRPC, which is not served here.
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
    server: Bucket

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        # Clients that are killed do not say goodbye.
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def answer(self, status: int, content: object = b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def asked(self) -> tuple[str | None, dict[str, str]]:
        """(name of the object, query); the name is None where none is in the path."""
        url = urlsplit(self.path)
        path = url.path.removeprefix("/upload").removeprefix("/download")
        _, _, name = path.partition(f"/storage/v1/b/{BUCKET}/o/")
        return unquote(name) or None, dict(parse_qsl(url.query))

    def refused(self, name: str, query: dict[str, str]) -> int:
        """The status that a condition on the object's generation ends in, or 0."""
        generation = self.server.objects.get(name, (0, b""))[0]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return 412
        return 304 if int(query.get("ifGenerationNotMatch", -1)) == generation else 0

    def describe(self, name: str) -> dict[str, str]:
        generation, content = self.server.objects[name]
        return {
            "kind": "storage#object",
            "bucket": BUCKET,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def do_GET(self):
        name, query = self.asked()
        path = urlsplit(self.path).path
        with self.server.lock:
            if path == f"/storage/v1/b/{BUCKET}":
                self.answer(200, {"kind": "storage#bucket", "name": BUCKET})
            elif path == f"/storage/v1/b/{BUCKET}/o":
                self.answer(200, self.list(query))
            elif name not in self.server.objects:
                self.answer(404, {"error": {"code": 404, "message": "Not Found"}})
            elif status := self.refused(name, query):
                self.answer(status)
            elif query.get("alt") != "media":
                self.answer(200, self.describe(name))
            else:
                self.send_content(*self.server.objects[name])

    def list(self, query: dict[str, str]) -> dict[str, object]:
        """Objects, and what they have in common up to the delimiter, page by page."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first = max(query.get("startOffset", ""), query.get("pageToken", ""))
        entries: dict[str, bool] = {}
        for name in sorted(self.server.objects):
            if not name.startswith(prefix) or name < first:
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            rest = name[len(prefix) :]
            folder = bool(delimiter) and delimiter in rest
            entries[prefix + rest.split(delimiter)[0] + "/" if folder else name] = folder
        shown = list(entries)[: int(query.get("maxResults", 1000))]
        page = {
            "kind": "storage#objects",
            "prefixes": [entry for entry in shown if entries[entry]],
            "items": [self.describe(entry) for entry in shown if not entries[entry]],
        }
        if len(shown) < len(entries):
            page["nextPageToken"] = list(entries)[len(shown)]
        return page

    def send_content(self, generation: int, content: bytes):
        """All of an object, or the range that is asked for."""
        headers = {"X_Goog_Generation": generation}
        if "Range" not in self.headers:
            return self.answer(200, content, **headers)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start, size = int(first) if first else len(content) - int(last), len(content)
        stop = min(size, int(last) + 1) if first and last else size
        if start >= size:
            return self.answer(416)
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
        return self.answer(206, content[start:stop], **headers)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, query = self.asked()
        kind, name = query.get("uploadType"), query.get("name")
        if kind == "media":
            self.store(name, body, query)
        elif kind == "multipart":
            # The name is in the first part, the content in the second.
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            about, content = email.message_from_bytes(head + body).get_payload()
            name = json.loads(about.get_payload())["name"]
            self.store(name, content.get_payload(decode=True), query)
        elif kind == "resumable":
            upload = str(next(self.server.generations))
            self.server.uploads[upload] = name, bytearray()
            url = f"{self.server.url}/upload/storage/v1/b/{BUCKET}/o?upload_id={upload}"
            self.answer(200, {}, Location=url)
        elif "upload_id" in query:
            name, content = self.server.uploads[query["upload_id"]]
            content += body
            if self.headers["Content-Range"].endswith("/*"):
                self.answer(308, Range=f"bytes=0-{len(content) - 1}")
            else:
                self.store(name, bytes(content), query)
        else:
            self.answer(501, {"error": {"code": 501, "message": self.path}})

    def store(self, name: str, content: bytes, query: dict[str, str]):
        with self.server.lock:
            if status := self.refused(name, query):
                self.answer(status)
            else:
                self.server.objects[name] = next(self.server.generations), content
                self.answer(200, self.describe(name))

    def do_DELETE(self):
        name, query = self.asked()
        with self.server.lock:
            if name not in self.server.objects:
                self.answer(404, {"error": {"code": 404, "message": "Not Found"}})
            elif status := self.refused(name, query):
                self.answer(status)
            else:
                del self.server.objects[name]
                self.answer(204)
