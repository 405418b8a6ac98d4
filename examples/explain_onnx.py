"""Explain a photograph by a file of `bcoskit export`: with onnxruntime, and Pillow to read it, alone.

python explain_onnx.py model.onnx cat.jpg
"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000


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


if __name__ == "__main__":
    answer = explained(onnxruntime.InferenceSession(sys.argv[1]), Path(sys.argv[2]).read_bytes())
    sys.stdout.write(json.dumps(answer) + "\n")
