"""A page in the browser that explains photographs: `bcoskit app`, and what it is made of.

`ExplanationService` answers requests of several users by the batch, and knows nothing of pages; `make_page` is a thin
layer over it, which Gradio shows; `serve` puts it on an address of this machine.
"""

from bcoskit.app._page import make_page
from bcoskit.app._server import serve
from bcoskit.app._service import ExplanationService, Photograph

__all__ = ["ExplanationService", "Photograph", "make_page", "serve"]
