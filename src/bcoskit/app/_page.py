"""The page: fields and what happens when they are used. All that is computed or drawn is elsewhere."""

import asyncio
import base64
import functools
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from PIL import Image

from bcoskit._explain import Explanation
from bcoskit.app import _html
from bcoskit.app._figures import figures, place_figures
from bcoskit.app._pictures import Controls, comparison_map, packed, panels, png, sheet
from bcoskit.app._service import ExplanationService, Photograph
from bcoskit.app._upload import only_uploads, upload_field
from bcoskit.dynamic import NotLinearError
from bcoskit.viz._pictures import usual_smooth

METHODS = {
    "grad_cam": "Grad-CAM",
    "integrated_gradients": "Integrated Gradients",
    "input_x_gradient": "Input x Gradient",
    "gradient": "Gradient",
    "guided_backprop": "Guided Backpropagation",
    "deep_lift": "DeepLIFT",
    "occlusion": "Occlusion",
}
_LOGGER = logging.getLogger(__name__)
_FAILED = "This cannot be done"
_PROGRESS = gr.Progress()  # which Gradio finds as the default of an argument
_NONE = -1  # of a class that is not chosen
_SWEEPS = (30, 300)  # every so many seconds, of files of uploads that are older than so many
_SESSIONS = 128  # tabs whose image stays in memory
_FIRST = "chelsea"  # of the package's photographs
_FORMATS = ("npz", "safetensors")


_Made = TypeVar("_Made")


@dataclass(frozen=True, eq=False)
class Shown:
    """What a tab shows: in memory, and nowhere else."""

    photograph: Photograph
    explanation: Explanation


def make_page(service: ExplanationService) -> gr.Blocks:
    """The page of a service, and its API: the endpoints `/explain` and `/compare`.

    Args:
        service: What explains.

    Returns:
        A page of Gradio, which `serve` puts on an address.
    """
    return in_event_loop(lambda: _made(service))


def _made(service: ExplanationService) -> gr.Blocks:
    page = gr.Blocks(title="bcoskit", analytics_enabled=False, delete_cache=_SWEEPS)
    page.state_session_capacity = _SESSIONS
    with page:
        _drawn(_html.header(service.model.name, len(service.classes), getattr(service.ordinary, "name", None)))
        _Fields(service, page).connect()
        _add_api(service)
    only_uploads(page)
    return page.queue(max_size=100, default_concurrency_limit=16)


def in_event_loop(make: Callable[[], _Made]) -> _Made:
    """What is made while an event loop runs; without one Gradio starts some that it does not close."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:

        async def made() -> _Made:
            return make()

        return asyncio.run(made())
    return make()


def answered(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the API, whose errors become one line."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever it is, who has asked is told, and the server lives on
            raise gr.Error(_line(error), title=_FAILED, print_exception=False) from None

    return call


def shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """What an event of the page does: an error becomes a note on the page, which stays as it is otherwise.

    Gradio shows notes as markup, in which nothing may be a user's.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever it is, who has asked is told, and the server lives on
            gr.Warning(escape(_line(error), quote=False), title=_FAILED)
            return gr.skip()

    return call


def _line(error: Exception) -> str:
    """What an error says."""
    if isinstance(error, (ValueError, NotLinearError)):
        return str(error)[:600]
    _LOGGER.error("a request has failed", exc_info=error)
    return f"the server has failed ({type(error).__name__}); its log says why"


class _Fields:
    """The fields of the page, from top to bottom, and what connects them."""

    def __init__(self, service: ExplanationService, page: gr.Blocks) -> None:
        self.service, self.page = service, page
        self.photographs = _photographs()
        size = service.model.transform.size
        choices = list(zip(service.classes, range(len(service.classes)), strict=True))
        self.state = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280, elem_id="choose"):
                self.upload = upload_field(label="Photograph", height=112, elem_id="upload")
                self.examples = _drawn(
                    _html.thumbnails(self.photographs), js_on_load=asset("buttons.js"), elem_id="examples"
                )
                with gr.Row():
                    self.target = gr.Dropdown(
                        choices, value=None, label="Explain", min_width=120, interactive=True, elem_id="target"
                    )
                    self.versus = gr.Dropdown(
                        [("nothing", _NONE), *choices],
                        value=_NONE,
                        label="Against",
                        min_width=120,
                        interactive=True,
                        elem_id="versus",
                    )
                self.classes = _drawn("", js_on_load=asset("buttons.js"), elem_id="classes")
                if not service.has_classes:
                    _drawn("<p>This network has no classes: its outputs are numbered, and have no probabilities.</p>")
            with gr.Column(scale=3, min_width=320, elem_id="see"):
                self.viewer = _drawn(_html.EMPTY, js_on_load=asset("page.js"), elem_id="viewer")
                with gr.Row(elem_id="controls"):
                    self.over = gr.Checkbox(label="Over the image", min_width=150, elem_id="over")
                    self.opacity = gr.Slider(0, 1, 0.7, step=0.05, label="Opacity", min_width=130, elem_id="opacity")
                    self.smooth = gr.Slider(
                        1, max(31, usual_smooth(size)), usual_smooth(size), step=2, label="Smoothing", min_width=130
                    )
                    self.percentile = gr.Slider(90, 100, 99.5, step=0.1, label="Percentile", min_width=130)
                with gr.Tabs():
                    with gr.Tab("Numbers"):
                        self.place = _drawn(_html.place(None), elem_id="place")
                        self.numbers = _drawn("", elem_id="numbers")
                    with gr.Tab("Compare"):
                        self._add_comparison()
                    with gr.Tab("Download"):
                        self.format = gr.Radio(_FORMATS, value="npz", label="Data as", elem_id="format")
                        self.pack = gr.Button("Prepare picture and data", variant="primary", elem_id="pack")
                        self.files = _drawn("", elem_id="files")

    def _add_comparison(self) -> None:
        self.methods = gr.CheckboxGroup(
            [(title, key) for key, title in METHODS.items()],
            value=["grad_cam", "integrated_gradients"],
            label="Methods beside W(x)·x",
            elem_id="methods",
        )
        self.compare = gr.Button("Compare", variant="primary", elem_id="compare")
        hint = (
            ""
            if self.service.ordinary is not None
            else "<small>With <code>bcoskit app --ordinary NAME</code> an ordinary network stands beside it.</small>"
        )
        self.comparison = _drawn(hint, elem_id="comparison")
        self.hint = hint

    def connect(self) -> None:
        """What happens when the fields are used."""
        controls = [self.over, self.opacity, self.smooth, self.percentile]
        news = [self.state, self.viewer, self.classes, self.target, self.versus, self.numbers, self.place]
        news += [self.comparison, self.files]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        self.page.load(self.open_first, controls, news, **quiet)
        opened = self.upload.upload(self.open_upload, [self.upload, *controls], news, **quiet)
        # Whether it could be opened or not, the field is free for the next one.
        opened.then(lambda: None, None, self.upload, api_visibility="private", show_progress="hidden")
        self.examples.click(self.open_example, controls, news, **quiet)
        self.classes.click(self.choose_class, [self.state, *controls], news, **quiet)
        for choice in (self.target, self.versus):
            choice.input(self.choose, [self.state, self.target, self.versus, *controls], news, **quiet)
        for event in (self.over.input, self.opacity.release, self.smooth.release, self.percentile.release):
            event(self.draw, [self.state, *controls], self.viewer, trigger_mode="always_last", **quiet)
        self.viewer.click(self.point, [self.state, self.smooth], self.place, trigger_mode="always_last", **quiet)
        self.compare.click(
            self.compare_methods,
            [self.state, self.methods, self.smooth],
            self.comparison,
            api_visibility="private",
            concurrency_limit=4,
        )
        self.pack.click(self.download, [self.state, self.format], self.files, **quiet)

    @shown
    def open_first(self, *controls: Any) -> list[Any]:
        """Show a photograph at the start, so that the page shows at once what it is for."""
        return self._open(dict(self.photographs)[_FIRST], controls)

    @shown
    def open_upload(self, data: bytes | None, *controls: Any) -> list[Any]:
        """Show a photograph of the user's."""
        if data is None:
            raise ValueError("choose an image")
        return self._open(data, controls)

    @shown
    def open_example(self, event: gr.EventData, *controls: Any) -> list[Any]:
        """Show a photograph of the package's."""
        return self._open(self.photographs[_index(event, "index", len(self.photographs))][1], controls)

    def _open(self, data: bytes, controls: Sequence[Any]) -> list[Any]:
        photograph = self.service.read(data)
        return self._news(Shown(photograph, self.service.explain(photograph)), controls)

    @shown
    def choose_class(self, event: gr.EventData, state: Shown | None, *controls: Any) -> list[Any]:
        """Explain the class of a button."""
        index = _index(event, "index", len(self.service.classes))
        return self._explained(_opened(state), index, None, controls)

    @shown
    def choose(self, state: Shown | None, target: int | None, versus: int | None, *controls: Any) -> list[Any]:
        """Explain the class that is chosen, or its difference to another."""
        against = None if versus is None or versus == _NONE else int(versus)
        return self._explained(_opened(state), None if target is None else int(target), against, controls)

    def _explained(self, tab: Shown, target: int | None, versus: int | None, controls: Sequence[Any]) -> list[Any]:
        return self._news(
            Shown(tab.photograph, self.service.explain(tab.photograph, target, versus)),
            controls,
        )

    def _news(self, tab: Shown, controls: Sequence[Any]) -> list[Any]:
        told = figures(self.service, tab.explanation)
        target, versus = told["target"]["index"], None if told["versus"] is None else told["versus"]["index"]
        return [
            tab,
            self._viewed(tab, controls),
            _html.class_list(told["classes"], target, versus),
            target,
            _NONE if versus is None else versus,
            _html.numbers(told),
            _html.place(None),
            self.hint,
            "",
        ]

    def _viewed(self, tab: Shown, controls: Sequence[Any]) -> str:
        over, opacity, smooth, percentile = controls
        chosen = Controls(bool(over), float(opacity), int(smooth), float(percentile))
        pictures = panels(self.service, tab.photograph, tab.explanation, chosen)
        told = figures(self.service, tab.explanation)
        return _html.viewer(pictures, tab.explanation.contributions[0], told["value"], _html.subject(told))

    @shown
    def draw(self, state: Shown | None, *controls: Any) -> Any:
        """Draw what is shown with other controls."""
        return gr.skip() if state is None else self._viewed(state, controls)

    @shown
    def point(self, event: gr.EventData, state: Shown | None, smooth: int) -> str:
        """Tell what a place contributes."""
        tab = _opened(state)
        height, width = tab.explanation.contributions.shape[-2:]
        row, column = _index(event, "row", height), _index(event, "column", width)
        return _html.place(place_figures(tab.explanation, row, column, int(smooth)))

    @shown
    def compare_methods(self, state: Shown | None, methods: list[str], smooth: int, progress: Any = _PROGRESS) -> str:
        """Show what other methods say, and what they say of the ordinary network."""
        tab = _opened(state)
        target = int(figures(self.service, tab.explanation)["target"]["index"])
        rows: dict[str, list[tuple[str, Image.Image | str]]] = {}
        networks = [(False, f"{self.service.model.name}, B-cos")]
        if self.service.ordinary is not None:
            networks.append((True, f"{self.service.ordinary.name}, ordinary"))
        jobs = [(ordinary, title, method) for ordinary, title in networks for method in ("bcos", *methods)]
        for ordinary, title, method in progress.tqdm(jobs, desc="Comparing"):
            rows.setdefault(title, []).append(self._compared(tab.photograph, target, method, ordinary, int(smooth)))
        return _html.comparison(rows, self.service.classes[target]) + self.hint

    def _compared(
        self, photograph: Photograph, target: int, method: str, ordinary: bool, smooth: int
    ) -> tuple[str, Image.Image | str]:
        title = "W(x)·x" if method == "bcos" else METHODS.get(method, method)
        try:
            return title, comparison_map(self.service.attribute(photograph, target, method, ordinary=ordinary), smooth)
        except (ValueError, NotLinearError) as error:  # a method that does not fit this network says so in its place
            return title, str(error)[:300]

    @shown
    def download(self, state: Shown | None, format: str) -> str:
        """Offer the picture and the data of what is shown."""
        tab = _opened(state)
        picture = png(sheet(self.service, tab.photograph, tab.explanation))
        return _html.downloads(
            [
                ("explanation.png", "image/png", picture),
                (f"explanation.{format}", "application/octet-stream", saved(tab.explanation, format)),
            ]
        )


def _add_api(service: ExplanationService) -> None:
    """The endpoints for programs."""
    with gr.Row(visible=False):
        image, again = upload_field(label="image"), upload_field(label="image")
        target, versus = gr.Textbox(label="target"), gr.Textbox(label="versus")
        shares, data = gr.Checkbox(label="shares"), gr.Textbox("none", label="data")
        method, ordinary = gr.Textbox(label="method"), gr.Checkbox(label="ordinary")
        answer = gr.JSON(label="answer")
        explain, compare = gr.Button(), gr.Button()

    @answered
    def explained(image: bytes | None, target: str, versus: str, shares: bool, data: str) -> dict[str, Any]:
        """Explain an image: figures, and the whole explanation as base64 of a file if `data` is npz or safetensors."""
        photograph = service.read(image or b"")
        explanation = service.explain(
            photograph, service.class_index(target, "target"), service.class_index(versus, "versus"), shares=shares
        )
        file = None if data == "none" else base64.b64encode(saved(explanation, data)).decode("ascii")
        return {**figures(service, explanation), "data": file}

    @answered
    def compared(image: bytes | None, target: str, method: str, ordinary: bool) -> dict[str, Any]:
        """Contributions by another method: base64 of little-endian single precision, row by row."""
        photograph = service.read(image or b"")
        index = service.class_index(target, "target")
        if index is None:
            raise ValueError("`target` must name a class")
        if method not in ("bcos", *METHODS):  # others take minutes, in which nobody else is answered
            raise ValueError(f"`method` (={str(method)[:60]!r}) must be of: bcos, {', '.join(METHODS)}")
        found = service.attribute(photograph, index, method, ordinary=ordinary)
        return {"shape": list(found.shape), "contributions": packed(found)}

    explain.click(explained, [image, target, versus, shares, data], answer, api_name="explain")
    compare.click(compared, [again, target, method, ordinary], answer, api_name="compare", concurrency_limit=4)


def saved(explanation: Explanation, format: str) -> bytes:
    """The bytes of what `Explanation.save` writes."""
    if format not in _FORMATS:
        raise ValueError(f"`data` (={str(format)[:20]!r}) must be of: none, {', '.join(_FORMATS)}")
    with tempfile.TemporaryDirectory(prefix="bcoskit-") as folder:
        path = Path(folder, f"explanation.{format}")
        explanation.save(path)
        return path.read_bytes()


def _drawn(html: str, **options: Any) -> gr.HTML:
    """HTML with the look that `page.css` gives it."""
    return gr.HTML(html, apply_default_css=False, **options)


def _opened(state: Shown | None) -> Shown:
    if state is None:
        raise ValueError(
            "choose an image first (a tab's is forgotten after half an hour without use, or when many tabs are open)"
        )
    return state


def _index(event: gr.EventData, name: str, count: int) -> int:
    value = (event._data or {}).get(name)
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"`{name}` must be a whole number below {count}")
    return value


def _photographs() -> list[tuple[str, bytes]]:
    folder = resources.files("bcoskit.assets") / "photographs"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".jpg")), key=lambda file: file.name)
    return [(file.name.removesuffix(".jpg"), file.read_bytes()) for file in files]


def asset(name: str) -> str:
    """The text of a file that goes with the page."""
    return (resources.files("bcoskit.app") / name).read_text(encoding="utf-8")
