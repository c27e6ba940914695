"""A hub of data sets on this machine: the parts of the Hugging Face hub's interface by which its
client lists and downloads files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder/OWNER/NAME` as data sets; yield the address and the paths of all requests.
    Unknown data sets are answered as the hub does, by 401 and RepoNotFound."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(path)
            headers: dict[str, str] = {"X-Repo-Commit": COMMIT}
            body, status = b"", 200
            if path.startswith("api/datasets/"):
                owner, name, *rest = path.removeprefix("api/datasets/").split("/")
                files = _files(folder / owner / name)
                if files is None:
                    status, headers = 401, {"X-Error-Code": "RepoNotFound"}
                elif rest[:1] == ["tree"]:
                    body = json.dumps([_entry(folder / owner / name, f) for f in files]).encode()
                else:
                    siblings = [{"rfilename": file} for file in files]
                    about = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
                    body = json.dumps(about).encode()
            else:
                _, owner, name, _, _, *rest = path.split("/")
                file = folder / owner / name / "/".join(rest)
                if file.is_file():
                    body = file.read_bytes()
                    headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
                else:
                    status, headers = 404, {"X-Error-Code": "EntryNotFound"}
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _files(repository: Path) -> list[str] | None:
    if not repository.is_dir():
        return None
    files = (path for path in repository.rglob("*") if path.is_file())
    return sorted(path.relative_to(repository).as_posix() for path in files)


def _entry(repository: Path, file: str) -> dict[str, object]:
    content = (repository / file).read_bytes()
    digest = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": file, "size": len(content), "oid": digest}
