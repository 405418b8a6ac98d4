"""A small exported network, which the tests of this folder share."""

import pytest

from bcoskit.data import ImageTransform
from bcoskit.export import export_onnx
from export_toys import CLASSES, small_network


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The network, its transform, and its file."""
    network, transform = small_network(), ImageTransform(size=16, resize=20)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    card = {"source": "here", "licence": "none"}
    export_onnx(network, path, transform=transform, classes=CLASSES, card=card, weights_output=True)
    return network, transform, path
