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
    options = {"transform": transform, "classes": CLASSES, "loss": "cross_entropy", "card": card}
    export_onnx(network, path, weights_output=True, **options)
    return network, transform, path
