"""The folder of a run: what is in it, and whether a run can go on from there."""

import hashlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch

from bcoskit._files import UNFINISHED, whole_file
from bcoskit.data import InMemoryImages, StreamedImages
from bcoskit.training._options import check_whole

_SAMPLED = 64  # images that tell datasets apart
CHECKPOINT, SETTINGS, MODEL = Path("checkpoints", "last.ckpt"), "settings.json", "model.safetensors"
EXPLANATIONS = "explanations"


def check_ranges(epochs: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Raise a `ValueError` for the first value that is out of its range."""
    check_whole("epochs", epochs, 1)
    check_whole("batch_size", batch_size, 1)
    check_whole("seed", seed, 0, 2**63 - 1)
    if not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < math.inf:
        raise ValueError(f"`learning_rate` (={learning_rate}) must be above 0 and finite")


def settings_before(out: Path, resume: bool) -> dict[str, Any]:
    """The settings of the run in `out` that is to be resumed; empty if there is nothing to go on from."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` (={str(out)!r}) must be a folder")
    checkpoint, settings = out / CHECKPOINT, out / SETTINGS
    if not resume and (checkpoint.exists() or (out / MODEL).exists()):
        raise ValueError(f"`out` (={str(out)!r}) holds a run already; `resume` it, or choose another folder")
    if not checkpoint.exists():
        if (out / MODEL).exists():
            raise ValueError(f"`out` (={str(out)!r}) holds a trained model, and no checkpoint; choose another folder")
        return {}
    content = _content_of(checkpoint)
    if content is None:
        raise ValueError(f"{checkpoint}: is no intact checkpoint, the run cannot be resumed")
    if not _is_of_a_run(content):
        raise ValueError(f"{checkpoint}: is no checkpoint of a training run")
    try:
        before = json.loads(settings.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{settings}: cannot be read, so that the run cannot be resumed ({error})") from error
    if not isinstance(before, dict) or not before:
        raise ValueError(f"{settings}: holds no settings, so that the run cannot be resumed")
    return before


def _content_of(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint holds; None if it is damaged, or none."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            if archive.testzip() is not None:  # torch does not compare the sums that it writes
                return None
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # damaged files are answered with nearly every kind of exception
        return None
    return content if isinstance(content, dict) and content else None


def _is_of_a_run(content: dict[str, Any]) -> bool:
    """Whether there is all that a run needs to go on as if it had never stopped; Lightning takes what there is."""
    expected = {"epoch": int, "global_step": int, "pytorch-lightning_version": str, "state_dict": dict, "loops": dict}
    if not all(isinstance(content.get(key), kind) for key, kind in expected.items()):
        return False
    of_one = (content.get("optimizer_states"), content.get("lr_schedulers"))
    return all(isinstance(each, list) and len(each) == 1 for each in of_one) and "fit_loop" in content["loops"]


def data_digest(images: InMemoryImages | StreamedImages) -> str:
    """Of all labels and of some images: tells whether a run goes on with the data that it began with."""
    digest = hashlib.sha256(images.labels.cpu().numpy().tobytes())
    places = torch.linspace(0, len(images) - 1, min(len(images), _SAMPLED)).round().long()
    digest.update(images.__getitems__(places.tolist())[0].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_unchanged(settings: dict[str, Any], before: dict[str, Any], out: Path) -> None:
    """Raise a `ValueError` for the first setting that is another one than in the run that is to be resumed."""
    changed = [name for name in settings if not _is_same(before.get(name, settings[name]), settings[name])]
    # Those of the data are not known yet when the others are compared.
    missing = [
        name for name in before if name not in settings and name not in ("classes", "data", "test_data", "images")
    ]
    for name in (*changed, *missing):
        now = settings.get(name, "not given")
        raise ValueError(
            f"`{name}` (={now}) was {before[name]} in the run in {out}; "
            "resume it with the same settings, or choose another folder"
        )


def _is_same(before: Any, now: Any) -> bool:
    """Whether a setting is unchanged; a run of an older version may have had fewer options."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_is_same(before.get(name, value), value) for name, value in now.items())
    return before == now


def write_settings(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run that begins or goes on."""
    out.mkdir(parents=True, exist_ok=True)
    for place in (out, (out / CHECKPOINT).parent, out / EXPLANATIONS):
        for leftover in place.glob(UNFINISHED):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
    with whole_file(out / SETTINGS) as unfinished:
        unfinished.write_text(json.dumps(settings, indent=2) + "\n")
