"""The folder of a run: what is in it, and whether a run can go on from there."""

import hashlib
import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bcoskit._files import UNFINISHED, whole_file
from bcoskit._processes import is_first
from bcoskit.models import Network, save_model
from bcoskit.training._loading import Images
from bcoskit.training._options import check_whole

_SAMPLED = 64  # images that tell datasets apart
CHECKPOINT, SETTINGS, MODEL = Path("checkpoints", "last.ckpt"), "settings.json", "model.safetensors"
EXPLANATIONS = "explanations"


class RunFolder:
    """The folder of a run, and the settings by which one that goes on is known to be the same.

    Args:
        out: The folder.
        settings: What is known before an image is read.
        resume: Whether to go on from the checkpoint in the folder, if there is one.

    Attributes:
        out: The folder.
        settings: What is known by now.

    Raises:
        ValueError: If the folder holds another run, a damaged one, or one that is not to be resumed.
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.out = out
        self.settings: dict[str, Any] = {}
        self._before = _settings_before(out, resume)
        self.settle(**settings)

    @property
    def resumed(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(self._before)

    def settle(self, **settings: Any) -> None:
        """Add settings; raises a `ValueError` for the first that was another one in the run that is resumed."""
        self.settings |= settings
        _check_unchanged(self.settings, self._before, self.out)

    def settle_data(self, train_images: Images, test_images: Images) -> None:
        """Add what tells the images apart from others; raises as `settle`."""
        self.settle(data=_digest(train_images), test_data=_digest(test_images))

    def begin(self) -> None:
        """Make the folder, with the settings in it."""
        if is_first():
            _write_settings(self.out, self.settings)

    def finish(self, network: Network, classes: Sequence[str], figures: dict[str, float]) -> None:
        """Write the file of the network, with the settings and what was measured in the end."""
        if is_first():
            training = {**self.settings, **figures}
            save_model(network, self.out / MODEL, classes=classes, transform=network.transform, training=training)


def check_ranges(epochs: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Raise a `ValueError` for the first value that is out of its range."""
    check_whole("epochs", epochs, 1)
    check_whole("batch_size", batch_size, 1)
    check_whole("seed", seed, 0, 2**63 - 1)
    if not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < math.inf:
        raise ValueError(f"`learning_rate` (={learning_rate}) must be above 0 and finite")


def _settings_before(out: Path, resume: bool) -> dict[str, Any]:
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


def _digest(images: Images) -> str:
    """Of all labels and of some images: tells whether a run goes on with the data that it began with."""
    digest = hashlib.sha256(images.labels.cpu().numpy().tobytes())
    places = torch.linspace(0, len(images) - 1, min(len(images), _SAMPLED)).round().long()
    digest.update(images.__getitems__(places.tolist())[0].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_unchanged(settings: dict[str, Any], before: dict[str, Any], out: Path) -> None:
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


def _write_settings(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run that begins or goes on."""
    out.mkdir(parents=True, exist_ok=True)
    for place in (out, (out / CHECKPOINT).parent, out / EXPLANATIONS):
        for leftover in place.glob(UNFINISHED):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
    with whole_file(out / SETTINGS) as unfinished:
        unfinished.write_text(json.dumps(settings, indent=2) + "\n")
