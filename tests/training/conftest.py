"""What the tests of training share."""

import pytest

from training_runs import write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Green and red images: eight of each to train with, three to measure on."""
    root = tmp_path_factory.mktemp("data")
    write_images(root, "train", 8)
    write_images(root, "test", 3)
    return root
