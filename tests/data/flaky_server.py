"""A local server of files that loses connections."""

import contextlib
import http.server
import re
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.folder` by ranges; each `server.drop_every`-th answer ends after half of its bytes."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        whole = len(data)
        self.send_response(206 if span else 200)
        if span:
            first, last = int(span[1]), min(int(span[2]), whole - 1)
            data = data[first : last + 1]
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if not with_body:
            return
        with self.server.lock:
            self.server.answers += 1
            self.server.sent += len(data)
            drop = self.server.drop_every and self.server.answers % self.server.drop_every == 0
        if drop:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(folder):
    """Serve `folder`; the server knows its `url`, and `drop_every` may be set at any time."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.lock, server.answers, server.sent, server.drop_every = folder, threading.Lock(), 0, 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
