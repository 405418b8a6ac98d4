"""Networks on the Hugging Face Hub, or in a folder laid out the same way."""

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bcoskit._files import whole_file
from bcoskit._text import printable
from bcoskit.models._hub_files import WEIGHTS, hub_file, reach, reason
from bcoskit.models._network import Network
from bcoskit.models._registry import create_model, save_model

_CARD = "README.md"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_LISTED_CLASSES = 20


def save_pretrained(
    model: Network, folder: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None, half: bool = False
) -> Path:
    """Write a network and a model card to a folder, which `from_pretrained` opens and `push_to_hub` uploads.

    Args:
        model: A network that was made by `create_model`.
        folder: Where `model.safetensors` and `README.md` are written; a card that is there is kept.
        training: Plain values on how the weights came about, for the card and the file.
        half: As of `save_model`.

    Returns:
        The folder.

    Raises:
        ValueError: As `save_model`.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` (={str(folder)!r}) is a file")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_model(model, folder / WEIGHTS, training=training, half=half)
    except BaseException:
        with suppress(OSError):  # what others have written to meanwhile stays
            for path in missing:
                path.rmdir()
        raise
    card = folder / _CARD
    if not card.exists():
        with whole_file(card) as unfinished:
            unfinished.write_text(model_card(model, training or {}), encoding="utf-8")
    return folder


def push_to_hub(
    model: Network,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    training: Mapping[str, Any] | None = None,
    half: bool = False,
) -> str:
    """Upload a network and its model card to the Hugging Face Hub.

    Args:
        model: A network that was made by `create_model`.
        repo_id: `user/name`; it is made if it is not there.
        private: Whether a new repository is private.
        token: Access token; that of `hf auth login` if None.
        training: As of `save_pretrained`.
        half: As of `save_model`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If `repo_id` is no name of a repository, or as `save_model`.
        ConnectionError: If the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    _check_repository(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, training=training, half=half)
        try:
            api = HfApi(token=token, library_name="bcoskit")
            reach(api, repo_id)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder).commit_url)
        except Exception as error:  # the hub's client and what it stands on have many kinds
            raise ConnectionError(f"{repo_id} cannot be uploaded to the hub: {reason(error)}") from error


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    num_classes: int | None = None,
) -> Network:
    """Open a network that `save_pretrained` has written, or `push_to_hub` has uploaded.

    Args:
        source: A folder, or the name of a repository on the Hugging Face Hub, `user/name`.
        revision: Branch, tag or commit of the repository.
        token: Access token for private repositories; that of `hf auth login` if None.
        num_classes: As of `create_model`.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: If `source` is neither, or as `create_model`.
        ConnectionError: If the hub cannot be reached and has not been before, or has no such repository.
    """
    text = os.fspath(source)
    if text and Path(text).is_file():
        raise ValueError(f"`source` (={text!r}) is a file, which `create_model` opens")
    if text and Path(text).is_dir():
        if revision is not None:
            raise ValueError(f"`revision` (={revision!r}) must be None: {text} is a folder")
        return create_model(Path(text) / WEIGHTS, num_classes=num_classes)
    _check_repository(text)
    return create_model(hub_file(text, revision, token), num_classes=num_classes)


def model_card(model: Network, training: Mapping[str, Any]) -> str:
    """The text of a model card, in Markdown with the hub's header.

    Args:
        model: The network.
        training: Plain values on how the weights came about.

    Returns:
        The card.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    classes = [printable(name) for name in model.classes]
    more = f" … ({len(classes)} in all)" if len(classes) > _LISTED_CLASSES else ""
    facts = [
        f"- Network: `{model.name}`, {parameters:,} parameters.",
        f"- Input: {model.in_chans} channels at {model.transform.size}x{model.transform.size} pixels, "
        f"encoding `{model.transform.encoding}`.",
        f"- Classes: {', '.join(classes[:_LISTED_CLASSES])}{more}.",
        *(f"- {printable(str(key))}: {printable(str(value))}" for key, value in training.items() if key != "classes"),
    ]
    return "\n".join(
        (
            "---",
            "library_name: bcoskit",
            "pipeline_tag: image-classification",
            "tags:",
            "- b-cos",
            "- interpretability",
            "---",
            "",
            f"# {model.name}",
            "",
            "A network whose explanations are exact: its logits are `W(x)·x` and named constants.",
            "",
            *facts,
            "",
            "```python",
            "import bcoskit",
            "",
            'model = bcoskit.from_pretrained("user/name")  # this repository, or a folder with its files',
            'x = model.transform("photo.jpg").unsqueeze(0)',
            'bcoskit.explain(model, x).to_image().save("explanation.png")',
            "```",
            "",
        )
    )


def _check_repository(name: str) -> None:
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(f"{name!r:.200} is neither a folder nor the name of a repository, `user/name`")
