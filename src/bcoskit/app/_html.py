"""The pieces of the page that are drawn by hand, as HTML; whatever is not ours is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

from bcoskit._text import printable
from bcoskit.app._pictures import data_url, packed, png

_TITLES = {"image": "What the network sees", "map": "Contribution map", "colors": "Colour explanation"}
_NOTES = {
    "image": "resized and cropped as for the network",
    "map": '<span class="bc-scale" aria-hidden="true"></span>against … for',
    "colors": "the colours in which the image speaks for the class",
}
_MINUS, _DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
_LISTED = 12  # constants
EMPTY = (
    '<div class="bc-empty"><p>Drop a photograph on the left, or pick one of the examples.</p>'
    "<p>The network explains itself: each of its logits is a sum over the pixels, which you can see and read here.</p>"
    "</div>"
)


def name(text: str) -> str:
    """A name of unknown origin, in one line and escaped."""
    return escape(printable(text))


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A number as the page shows it, with a true minus; a dash if there is none."""
    if value is None:
        return _DASH
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", _MINUS)


def percent(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A share as the page shows it."""
    return _DASH if value is None else f"{number(100 * value, digits, sign=sign)} %"


def header(service_name: str, classes: int, ordinary: str | None) -> str:
    """The head of the page."""
    beside = "" if ordinary is None else f' <span class="bc-chip">beside {name(ordinary)}</span>'
    return (
        '<header class="bc-head"><h1>b<span>cos</span>kit</h1>'
        "<p>Photographs explained by the network itself: exactly, not approximately.</p>"
        f'<div><span class="bc-chip">{name(service_name)}</span> <span class="bc-chip">{classes:,} classes</span>'
        f"{beside}</div></header>"
    )


def thumbnails(photographs: Sequence[tuple[str, bytes]]) -> str:
    """Photographs to pick."""
    buttons = [
        f'<button type="button" data-index="{index}" title="{name(title)}">'
        f'<img alt="{name(title)}" src="{data_url(data, "image/jpeg")}"></button>'
        for index, (title, data) in enumerate(photographs)
    ]
    return f'<div class="bc-thumbs" role="group" aria-label="Examples">{"".join(buttons)}</div>'


def class_list(classes: Sequence[Mapping[str, Any]], target: int, versus: int | None) -> str:
    """The likeliest classes, each a button with its probability, or its logit where there is none."""
    logits = [row["logit"] for row in classes]
    low, high = min(0.0, *logits), max(0.0, *logits)

    def line(row: Mapping[str, Any]) -> str:
        probability = row["probability"]
        shown = number(row["logit"], 2) if probability is None else percent(probability)
        width = (row["logit"] - low) / (high - low or 1) if probability is None else probability
        chosen = " bc-target" if row["index"] == target else " bc-versus" if row["index"] == versus else ""
        return (
            f'<button type="button" class="bc-class{chosen}" data-index="{row["index"]}" '
            f'title="Explain {name(row["class"])}: logit {number(row["logit"], 3)}">'
            f'<span class="bc-name">{name(row["class"])}</span><span class="bc-value">{shown}</span>'
            f'<span class="bc-bar"><i style="width:{100 * width:.1f}%"></i></span></button>'
        )

    return f'<div class="bc-classes" role="group" aria-label="Classes">{"".join(map(line, classes))}</div>'


def viewer(pictures: Mapping[str, Image.Image], contributions: Tensor, value: float, subject: str) -> str:
    """The pictures side by side, which know the contribution of each pixel."""
    height, width = contributions.shape
    figures = [
        f'<figure><figcaption>{_TITLES[key]}</figcaption><div class="bc-picture">'
        f'<img alt="{_TITLES[key]}" src="{data_url(png(image))}" draggable="false"><i class="bc-mark"></i></div>'
        f"<small>{_NOTES[key]}</small></figure>"
        for key, image in pictures.items()
    ]
    return (
        f'<div class="bc-viewer" data-width="{width}" data-height="{height}" data-value="{value!r}" '
        f'data-numbers="{packed(contributions)}" data-count="{len(figures)}">'
        f'<p class="bc-subject">{subject}</p><div class="bc-panels">{"".join(figures)}</div>'
        '<p class="bc-hover" aria-live="polite">Point at a place to read its share; click to keep it.</p></div>'
    )


def subject(told: Mapping[str, Any]) -> str:
    """What is explained, in a sentence."""
    target, versus = told["target"], told["versus"]
    if versus is not None:
        return f"Why <b>{name(target['class'])}</b> and not <b>{name(versus['class'])}</b>?"
    likely = "" if target["probability"] is None else f" <span>{percent(target['probability'])} probable</span>"
    return f"What speaks for <b>{name(target['class'])}</b>?{likely}"


def numbers(told: Mapping[str, Any]) -> str:
    """The sum that a logit is, its constants by name, and how exact all is."""
    whole = "logit" if told["versus"] is None else "difference of logits"
    terms = [(whole, told["value"]), ("image, Σ W(x)·x", told["contributions"]), ("constants", told["bias"])]
    total, *parts = [f"<div><strong>{number(value)}</strong><span>{title}</span></div>" for title, value in terms]
    residual = told["residual"]
    left = _DASH if residual is None else f"{abs(residual):.0e}".replace("-", _MINUS) if residual else "0"
    return (
        f'<div class="bc-sum">{total}<i>=</i>{"<i>+</i>".join(parts)}</div>'
        f'<div class="bc-cards"><section><h3>Constants by name</h3>{_constants(told["shares"] or {})}</section>'
        f'<section><h3>Exactness</h3><p><strong class="bc-residual">{left}</strong> is left of the logit, relative, '
        "when image and constants are taken away. Each constant is evaluated by itself, so this tests the explanation; "
        f"rounding in single precision leaves up to about 1e{_MINUS}6.</p><p>Every operation behind the logit was "
        "checked to be linear once its factors are frozen.</p></section></div>"
    )


def _constants(shares: Mapping[str, float]) -> str:
    """The constants, the largest first, each with a bar."""
    if not shares:
        return "<p>There are none: all of the logit comes from the image.</p>"
    ordered = sorted(shares.items(), key=lambda item: -abs(item[1]))
    largest = abs(ordered[0][1]) or 1

    def row(title: str, share: float) -> str:
        side = "bc-for" if share > 0 else "bc-against"
        bar = f'<i class="{side}" style="width:{100 * abs(share) / largest:.1f}%"></i>'
        return f'<tr><td>{name(title)}</td><td class="bc-bar">{bar}</td><td>{number(share, 4, sign=True)}</td></tr>'

    rows = [row(*item) for item in ordered[:_LISTED]]
    if len(ordered) > _LISTED:
        rest = number(sum(share for _, share in ordered[_LISTED:]), 4, sign=True)
        rows.append(f"<tr><td>{len(ordered) - _LISTED} others</td><td></td><td>{rest}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def place(told: Mapping[str, Any] | None) -> str:
    """What a place contributes."""
    if told is None:
        return '<div class="bc-place">Click a place in a picture to keep its numbers here.</div>'
    around = ""
    if told["side"] > 1:
        side, parts = told["side"], [number(told[key], 4, sign=True) for key in ("square", "for", "against")]
        around = (
            f"<p>The {side} &times; {side} pixels around it: <strong>{parts[0]}</strong> "
            f"({percent(told['square_share'], 2, sign=True)}), of which {parts[1]} for and {parts[2]} against.</p>"
        )
    return (
        f'<div class="bc-place"><p>Row {told["row"]}, column {told["column"]}: '
        f"<strong>{number(told['contribution'], 5, sign=True)}</strong>, "
        f"{percent(told['share'], 2, sign=True)} of the whole.</p>{around}</div>"
    )


def comparison(rows: Mapping[str, Sequence[tuple[str, Image.Image | str]]], of: str) -> str:
    """Maps of several methods, a row for each network; where there is a text instead, it says why."""

    def cell(title: str, found: Image.Image | str) -> str:
        inner = (
            f'<p class="bc-why">{name(found)}</p>'
            if isinstance(found, str)
            else f'<div class="bc-picture"><img alt="{name(title)}" src="{data_url(png(found))}"></div>'
        )
        return f"<figure>{inner}<figcaption>{name(title)}</figcaption></figure>"

    parts = [
        f"<h3>{name(title)}</h3><div class='bc-methods'>{''.join(cell(*each) for each in cells)}</div>"
        for title, cells in rows.items()
    ]
    heading = f'<p class="bc-subject">Who says what of <b>{name(of)}</b>?</p>'
    note = "<p><small>Red speaks for the class, blue against it; each map has its own scale.</small></p>"
    return f'<div class="bc-compare">{heading}{"".join(parts)}{note}</div>'


def downloads(files: Sequence[tuple[str, str, bytes]]) -> str:
    """Links that hold their files, so that the server keeps none: names, kinds and bytes."""
    links = [
        f'<a class="bc-file" download="{name(file)}" href="{data_url(data, kind)}">{name(file)}'
        f"<span>{len(data) / 1000:,.0f} kB</span></a>"
        for file, kind, data in files
    ]
    return f'<div class="bc-files">{"".join(links)}</div>'
