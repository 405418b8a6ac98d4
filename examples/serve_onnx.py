"""Serve an exported network: POST an image, get class, probability and contribution map as JSON.

pip install onnxruntime pillow
python serve_onnx.py model.onnx [port]
curl --data-binary @cat.jpg http://127.0.0.1:8000/
"""

import base64
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MAX_BYTES, MAX_PIXELS, MAX_CONNECTIONS, MAX_AT_ONCE = 20_000_000, 50_000_000, 32, 2


def explained(session: onnxruntime.InferenceSession, body: bytes) -> dict[str, str | float | None]:
    """The answer to the bytes of an image."""
    facts = session.get_modelmeta().custom_metadata_map
    transform, classes = json.loads(facts["transform"]), json.loads(facts["classes"])
    size, shorter = transform["size"], transform["resize"] or transform["size"]
    image = Image.open(io.BytesIO(body), formats=["JPEG", "PNG", "WEBP"])
    longer = int(shorter * max(image.size) / min(image.size))
    if max(image.width * image.height, shorter * longer) > MAX_PIXELS:
        raise ValueError(f"more than {MAX_PIXELS} pixels, as it is or resized")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        raise ValueError(f"pixels of the kind {image.mode}, which 8 bits would clip")
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if transform["channels"] == 1 else "RGB")
    sides = (shorter, longer) if image.width <= image.height else (longer, shorter)
    image = image.resize(sides, Image.Resampling[transform["interpolation"].upper()])
    left, top = (round((side - size) / 2) for side in sides)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32).reshape(size, size, -1) / 255
    inputs = {"image": pixels.transpose(2, 0, 1)[None], "target": np.array([-1])}
    (logits,), (contributions,) = session.run(["logits", "contributions"], inputs)
    index, logits = int(logits.argmax()), logits.astype(float)
    # A sigmoid or a softmax makes probabilities; without them the outputs are no logits of classes.
    totals = {"bce": np.logaddexp(0, logits[index]), "cross_entropy": np.logaddexp.reduce(logits)}
    probability = float(np.exp(logits[index] - totals[facts["loss"]])) if facts["loss"] in totals else None
    # Red speaks for the class, blue against it, white is neutral.
    strength = contributions / max(float(np.abs(contributions).max()), 1e-12)
    red, blue = np.minimum(1, 1 + strength), np.minimum(1, 1 - strength)
    picture = Image.fromarray((255 * np.stack([red, np.minimum(red, blue), blue], -1)).astype(np.uint8))
    picture.save(png := io.BytesIO(), format="PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return {"class": classes[index], "probability": probability, "contributions": url}


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
