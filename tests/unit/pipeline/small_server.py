"""Stands for any process that a stage needs served: answers /health after a while, and /answer."""

import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

HOST, PORT, SECONDS, FATE = sys.argv[1:5]
began = time.monotonic()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        is_ready = time.monotonic() - began > float(SECONDS)
        self.send_response(200 if is_ready else 503)
        self.end_headers()
        if is_ready:
            self.wfile.write(b'{"port": %d}' % int(PORT))
        if is_ready and self.path == "/answer" and FATE == "dies":
            raise SystemExit(3)

    def log_message(self, *_):
        pass


if FATE == "broken":
    raise ValueError("this server cannot start")
HTTPServer((HOST, int(PORT)), Handler).serve_forever()
