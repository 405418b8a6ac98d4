"""Files of the Hugging Face Hub."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS = "model.safetensors"
_SECONDS = 10  # until the hub must have answered


def hub_file(repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """The file of weights of a repository, or what there is of it in the hub's cache if the hub cannot be reached."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    options: Any = {"revision": revision, "token": token, "library_name": "bcoskit"}
    try:
        reach(HfApi(token=token), repo_id)
        return Path(hf_hub_download(repo_id, WEIGHTS, etag_timeout=_SECONDS, **options))
    except HfHubHTTPError as error:  # it was reached, and refuses
        raise ConnectionError(f"{repo_id} cannot be had from the hub: {reason(error)}") from error
    except Exception as error:  # what the hub's client stands on has many kinds
        try:
            return Path(hf_hub_download(repo_id, WEIGHTS, local_files_only=True, **options))
        except Exception:
            raise ConnectionError(f"{repo_id} cannot be had from the hub: {reason(error)}") from error


def reach(api: "HfApi", repo_id: str) -> None:
    """Ask the hub for something small, since the rest would try again for minutes where there is no network."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with suppress(RepositoryNotFoundError):  # what follows tells more of it, or makes it
        api.model_info(repo_id, timeout=_SECONDS)


def reason(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
