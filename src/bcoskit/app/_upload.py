"""How photographs come in: what takes uploads, the field that hands them over, and what no field takes."""

import asyncio
import secrets
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fastapi
import gradio as gr
from gradio.data_classes import FileData
from gradio.routes import file_upload_statuses
from starlette.datastructures import UploadFile

UPLOAD = "/gradio_api/upload"


def receiver(folder: Path) -> Callable[..., Awaitable[list[str]]]:
    """What answers `UPLOAD` in Gradio's place, which would name files by those of users.

    Args:
        folder: Where the files go, by random names.

    Returns:
        An endpoint of FastAPI, which returns the paths.
    """

    async def received(request: fastapi.Request, upload_id: str = "") -> list[str]:
        if upload_id:
            file_upload_statuses.track(upload_id)
        try:
            async with request.form() as form:
                given = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
                if not given:
                    raise fastapi.HTTPException(400, "send an image, as a file of the form's field `files`")
                return [await asyncio.to_thread(_kept, part.file, folder) for part in given]
        finally:
            if upload_id:
                file_upload_statuses.set_done(upload_id)

    return received


def _kept(file: BinaryIO, folder: Path) -> str:
    path = folder / secrets.token_hex(16)
    with path.open("wb") as copy:
        shutil.copyfileobj(file, copy)
    return str(path)


def upload_field(**options: Any) -> gr.File:
    """A field that hands over the bytes of the file that a user gives, and nothing of its name."""
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
    named = str(path)
    if "\0" in named or "://" in named or not Path(named).resolve().is_relative_to(folder):
        raise _error("give the image itself: upload it")
    return str(Path(named).resolve())


def _error(message: str) -> gr.Error:
    return gr.Error(message, title="This cannot be done", print_exception=False)
