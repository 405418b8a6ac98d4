"""The field that takes a photograph, and what it refuses."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData


class Upload(gr.File):
    """Hands over the bytes of the file that a user gives, and leaves no copy of it.

    Its name, which the user chooses, goes nowhere.
    """

    is_template = True  # for Gradio: it looks like the component above it

    def preprocess(self, payload: Any) -> bytes | None:
        """The bytes of the file, which is removed."""
        if payload is None:
            return None
        if not isinstance(payload, FileData):
            raise gr.Error("give one image")
        path = Path(payload.path)
        try:
            return path.read_bytes()
        except OSError:
            raise gr.Error("the image is no longer there: give it again") from None
        finally:
            path.unlink(missing_ok=True)
            self.temp_files.discard(str(path))


async def _refused(address: Any) -> str | None:
    raise gr.Error("give the image itself, not an address")


def refuse_addresses(page: gr.Blocks) -> None:
    """No field of a page fetches an address that a request names: Gradio would do so for any of them."""
    for block in page.blocks.values():
        move = block.async_move_resource_to_block_cache

        async def local(address: Any, move: Any = move) -> str | None:
            return await (_refused(address) if "://" in str(address) else move(address))

        block.async_move_resource_to_block_cache = local  # type: ignore[method-assign]
