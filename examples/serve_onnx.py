"""Serve an exported network: POST an image, get class, probability and contribution map as JSON.

pip install onnxruntime pillow
python serve_onnx.py model.onnx [port]
curl --data-binary @cat.jpg http://127.0.0.1:8000/
"""

import base64
import io
import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MAX_BYTES, MAX_PIXELS = 20_000_000, 50_000_000
MAX_CONNECTIONS, MAX_AT_ONCE = 32, 2


def explained(session: onnxruntime.InferenceSession, body: bytes) -> dict[str, str | float | None]:
    """The answer to the bytes of an image."""
    facts = session.get_modelmeta().custom_metadata_map
    transform, classes = json.loads(facts["transform"]), json.loads(facts["classes"])
    image = Image.open(io.BytesIO(body), formats=["JPEG", "PNG", "WEBP"])
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("the image is too large")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        raise ValueError(f"the image has pixels of the kind {image.mode}, which 8 bits would clip")
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if transform["channels"] == 1 else "RGB")
    size, shorter = transform["size"], transform["resize"] or transform["size"]
    longer = int(shorter * max(image.size) / min(image.size))
    if shorter * longer > MAX_PIXELS:
        raise ValueError("the image is too elongated")
    sides = (shorter, longer) if image.width <= image.height else (longer, shorter)
    image = image.resize(sides, Image.Resampling[transform["interpolation"].upper()])
    left, top = (round((side - size) / 2) for side in sides)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32).reshape(size, size, -1) / 255
    logits, contributions = session.run(
        ["logits", "contributions"], {"image": pixels.transpose(2, 0, 1)[None], "target": np.array([-1])}
    )
    index, logit = int(logits[0].argmax()), logits[0].astype(float)
    # A sigmoid or a softmax makes probabilities; without them the outputs are no logits of classes.
    totals = {"bce": np.logaddexp(0, logit[index]), "cross_entropy": np.logaddexp.reduce(logit)}
    probability = float(np.exp(logit[index] - totals[facts["loss"]])) if facts["loss"] in totals else None
    # Red speaks for the class, blue against it, white is neutral.
    strength = contributions[0] / max(float(np.abs(contributions[0]).max()), 1e-12)
    red, blue = np.minimum(1, 1 + strength), np.minimum(1, 1 - strength)
    picture = Image.fromarray((255 * np.stack([red, np.minimum(red, blue), blue], -1)).astype(np.uint8))
    picture.save(png := io.BytesIO(), format="PNG")
    return {
        "class": classes[index],
        "probability": probability,
        "contributions": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode(),
    }


class Handler(BaseHTTPRequestHandler):
    """One request."""

    timeout = 30  # seconds that a silent connection is kept

    def do_POST(self) -> None:
        """Answer with JSON: an explanation, or what is wrong with the image."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self.answer(411, {"error": "send an image, with its Content-Length"})
        if int(length) > MAX_BYTES:
            return self.answer(413, {"error": f"send an image of at most {MAX_BYTES} bytes"})
        body = self.rfile.read(int(length))
        try:
            with self.server.at_once:
                content = explained(self.server.session, body)
        except Exception as error:  # decoders answer damaged images with nearly every kind of exception
            return self.answer(400, {"error": f"this image cannot be explained ({type(error).__name__})"})
        return self.answer(200, content)

    def answer(self, code: int, content: dict[str, str | float | None]) -> None:
        """Send JSON."""
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

    def process_request(self, request: socket.socket, address: tuple[str, int]) -> None:
        """Close a connection that is one too many."""
        if self.connections.acquire(blocking=False):
            super().process_request(request, address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, address: tuple[str, int]) -> None:
        """Answer a connection, and make place for another."""
        try:
            super().process_request_thread(request, address)
        finally:
            self.connections.release()


if __name__ == "__main__":
    Server(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000).serve_forever()
