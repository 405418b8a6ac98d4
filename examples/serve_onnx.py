"""Serve a file of `bcoskit export`: POST an image, get class, probability and contribution map as JSON.

python serve_onnx.py model.onnx [port]
curl --data-binary @cat.jpg http://127.0.0.1:8000/
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import onnxruntime
from explain_onnx import explained

MAX_BYTES, MAX_CONNECTIONS, MAX_AT_ONCE = 20_000_000, 32, 2


class Handler(BaseHTTPRequestHandler):
    """A connection."""

    timeout = 30  # seconds that a silent connection is kept

    def handle(self) -> None:
        """Close a connection that is one too many."""
        if self.server.connections.acquire(blocking=False):
            try:
                super().handle()
            finally:
                self.server.connections.release()

    def do_POST(self) -> None:
        """Answer with JSON: an explanation, or what is wrong with the image."""
        length, code = self.headers.get("Content-Length", ""), 200
        if not length.isdecimal():
            code, content = 411, {"error": "send an image, with its Content-Length"}
        elif int(length) > MAX_BYTES:
            code, content = 413, {"error": f"send an image of at most {MAX_BYTES} bytes"}
        else:
            body = self.rfile.read(int(length))
            try:
                with self.server.at_once:
                    content = explained(self.server.session, body)
            except Exception as error:  # decoders answer damaged images with nearly every kind of exception
                reason = error if isinstance(error, ValueError) else type(error).__name__
                code, content = 400, {"error": f"this image cannot be explained: {reason}"}
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


class Server(ThreadingHTTPServer):
    """A server of this machine alone: a thread per connection, of which some wait for their turn."""

    def __init__(self, path: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.session = onnxruntime.InferenceSession(path)
        self.connections, self.at_once = threading.Semaphore(MAX_CONNECTIONS), threading.Semaphore(MAX_AT_ONCE)


if __name__ == "__main__":
    Server(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000).serve_forever()
