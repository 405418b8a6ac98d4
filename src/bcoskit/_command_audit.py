"""`bcoskit audit`: is a network dynamic linear, and if not, where?"""

import json as json_module
import math
from dataclasses import replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bcoskit._audit import AuditReport, audit
from bcoskit.convert import BcosConfig, bcosify
from bcoskit.data import ImageTransform
from bcoskit.dynamic import ProductPolicy
from bcoskit.models import create_model

_WIDTH = 160  # of a table that goes to a file


def audit_model(
    model: str,
    *,
    weights: str | None = None,
    image: str | None = None,
    convert: Literal["bcosification", "v2", "v1", "exact"] | None = None,
    products: ProductPolicy = "split",
    json: bool = False,
) -> int:
    """Prove that a network is dynamic linear at an image, or name the operations that are not.

    Args:
        model: Name of a network, a file that training has written, or `timm/NAME` for an ordinary network of timm.
        weights: File or URL of the weights; by default those that go with its name, for a network of timm fresh ones.
        image: The image; by default noise.
        convert: Convert the network first, by the preset of that name.
        products: What becomes of products of two factors that both depend on the input: split, first or error.
        json: Print JSON instead of a table.

    Returns:
        The exit code: 0 if all audits passed, 1 if not.

    Raises:
        ValueError: If there is no such network, file or image, or the network's signal has died.
    """
    fresh = weights is None and model.startswith("timm/")
    network: Any = create_model(model, weights=not fresh if weights is None else weights)
    transform = network.transform
    if convert is not None:
        network = bcosify(network, BcosConfig.preset(convert), inplace=True)
        transform = replace(transform, encoding="bcos")
    report = audit(network.eval(), _input(transform, image), products=products)
    figures = _figures(model, report)
    console = Console()
    if json:
        console.print_json(json_module.dumps(figures))
    else:
        if not console.is_terminal:
            console.width = _WIDTH
        _print(console, figures)
    return 0 if report.passed else 1


def _input(transform: ImageTransform, image: str | None) -> Tensor:
    if image is not None:
        return transform(image)[None]
    noise = torch.randint(256, (1, 3, transform.size, transform.size), generator=torch.Generator().manual_seed(0))
    return transform.encode_pixels(noise.to(torch.uint8))


def _figures(model: str, report: AuditReport) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "model": model,
        "passed": report.passed,
        "products": report.products,
        "forward": number(report.forward),
        "numeric": number(report.numeric),
        "residual": number(report.residual),
        "shares": dict(report.shares),
        "offenders": [
            {
                "operation": offender.operation,
                "node": offender.node,
                "module": offender.module,
                "location": offender.location,
                "reason": offender.reason,
                "suggestion": offender.suggestion,
            }
            for offender in report.offenders
        ],
    }


def _print(console: Console, figures: dict[str, Any]) -> None:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}" if value else "0"

    table = Table("audit", "found", "must be", title=f"{figures['model']}, products: {figures['products']}")
    table.add_row("graph: operations that are not linear", str(len(figures["offenders"])), "0")
    table.add_row("numeric: derivative of W(x) with frozen factors", shown(figures["numeric"]), "0")
    table.add_row("forward: outputs inside and outside the explanation differ by", shown(figures["forward"]), "≤ 1e-10")
    table.add_row("completeness: residual in double precision", shown(figures["residual"]), "≤ 1e-10")
    for name, share in sorted(figures["shares"].items(), key=lambda item: -abs(item[1])):
        table.add_row(f"  constant: {name}", f"{share:.4f}", "")
    console.print(table, markup=False)
    if figures["offenders"]:
        columns = ("operation", "module", "location", "reason", "suggestion")
        offenders = Table(*columns, title="not linear")
        for offender in figures["offenders"]:
            offenders.add_row(*(offender[column] for column in columns))
        console.print(offenders, markup=False)
    console.print("passed" if figures["passed"] else "not passed")
