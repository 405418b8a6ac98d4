"""`bcoskit export`: a network with its explanation as one ONNX file."""

from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from bcoskit._text import printable
from bcoskit.dynamic import ProductPolicy
from bcoskit.export import export_onnx
from bcoskit.models import Network, create_model, list_models, model_row


def export_model(
    model: str,
    *,
    out: Path = Path("model.onnx"),
    weights: str | None = None,
    weights_output: bool = False,
    products: ProductPolicy = "split",
) -> int:
    """Write a network with its explanation as one ONNX file, which runs without torch.

    Args:
        model: Name of a network, or a file that training has written.
        out: The file, which ends in .onnx.
        weights: File or URL of the network's weights; by default those that go with its name.
        weights_output: Whether the file also returns W(x), for colour pictures.
        products: What becomes of products of two factors that both depend on the input: split, first or error.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: If there is no such network or file, or the explanation cannot be exported.
    """
    network = create_model(model, weights=True if weights is None else weights)
    card = _card(network, model, weights)
    with Console(stderr=True).status("exporting"):
        written = export_onnx(network, out, card=card, weights_output=weights_output, products=products)
    checked = (
        "not checked, since onnxruntime is not installed"
        if written.error is None
        else f"agrees with `explain` to {written.error:.0e}"
    )
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {checked}", markup=False)
    return 0


def _card(network: Network, model: str, weights: str | None) -> dict[str, str]:
    """What is known of where the weights come from, and of the terms of their use."""
    if weights is not None:
        return {"source": _without_secrets(weights)}
    if model not in list_models():
        return {"source": printable(Path(model).name)}
    checkpoint = model_row(network.name).checkpoint
    if checkpoint is None:
        return {}
    facts = {"source": checkpoint.source, "licence": checkpoint.licence}
    if checkpoint.accuracy is not None:
        facts["accuracy"] = f"{checkpoint.accuracy} % ({checkpoint.measured_on})"
    return facts


def _without_secrets(weights: str) -> str:
    """Of a path the file's name, of a URL neither user, password nor query: the file may be published."""
    if not weights.lower().startswith(("https://", "http://")):
        return printable(Path(weights).name)
    url = urlsplit(weights)
    return printable(f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}")
