"""The field that takes a photograph, and what no field takes."""

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData


def upload_field(**options: Any) -> gr.File:
    """A field that hands over the bytes of the file that a user gives, and nothing of its name.

    Gradio names its file by the user's, without special characters, in a folder named by the content. The file stays
    until the page's next sweep: users who upload the same image share it.
    """
    # No class of our own: Gradio writes a file beside the source of each subclass of its components.
    field = gr.File(**options)
    field.data_model = _Given
    vars(field)["preprocess"] = _bytes_of
    return field


class _Given(FileData):
    """What a request says of its file."""

    @classmethod
    def model_validate(cls, *args: Any, **kwargs: Any) -> "_Given":
        try:
            return super().model_validate(*args, **kwargs)
        except ValueError:
            raise _error("give one image, as a file that was uploaded") from None


def _bytes_of(payload: FileData | None) -> bytes | None:
    try:
        return None if payload is None else Path(payload.path).read_bytes()
    except OSError:
        raise _error("the image is no longer there: give it again") from None


def only_uploads(page: gr.Blocks) -> None:
    """No field of a page takes what a request names elsewhere: an address to fetch, or a file that was not uploaded.

    Gradio would fetch addresses for any field, and keeps requests from other files only where it is launched by itself.
    """
    for block in page.blocks.values():
        vars(block)["async_move_resource_to_block_cache"] = partial(_uploaded, Path(block.GRADIO_CACHE).resolve())


async def _uploaded(folder: Path, path: Any) -> str:
    file = Path(str(path)).resolve()
    if "://" in str(path) or not file.is_relative_to(folder):
        raise _error("give the image itself: upload it")
    return str(file)


def _error(message: str) -> gr.Error:
    return gr.Error(message, title="This cannot be done", print_exception=False)
