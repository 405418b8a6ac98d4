"""Networks in folders that are laid out as on the hub, and the hub itself, which is not there."""

import pytest
import torch

import bcoskit
from bcoskit.models import WeightsError, create_model, save_model

NAME = "cnn9.bcos_v1_b2_cifar10"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = create_model(NAME, num_classes=3, in_channels=2)
    model.classes = ("ill", "well", "unsure | <b>?")
    return model


def test_folder(network, tmp_path):
    folder = bcoskit.save_pretrained(network, tmp_path / "new" / "folder", training={"epochs": 3, "data": "x-rays"})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]
    for source in (folder, str(folder)):
        opened = bcoskit.from_pretrained(source)
        assert (opened.name, opened.classes, opened.transform) == (NAME, network.classes, network.transform)
        assert not opened.training
        x = bcoskit.encode(torch.rand(2, 1, 32, 32))
        assert torch.equal(opened(x), network(x))
    assert bcoskit.from_pretrained(folder, num_classes=5)(x).shape == (2, 5)


def test_model_card(network, tmp_path):
    card = (bcoskit.save_pretrained(network, tmp_path, training={"epochs": 3}) / "README.md").read_text()
    header, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: bcoskit" in header
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert f"- Network: `{NAME}`, {parameters:,} parameters." in text
    assert "- Input: 2 channels at 32x32 pixels, encoding `bcos`." in text
    assert "- Classes: ill, well, unsure | <b>?." in text
    assert "- epochs: 3" in text
    (tmp_path / "README.md").write_text("mine")
    bcoskit.save_pretrained(network, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_refusals(network, tmp_path):
    with pytest.raises(ValueError, match=r"'nothing' is neither a folder nor the name of a repository"):
        bcoskit.from_pretrained("nothing")
    with pytest.raises(ValueError, match="is neither a folder"):
        bcoskit.push_to_hub(network, "a/b/c")
    with pytest.raises(WeightsError, match=r"model.safetensors: no such file"):
        bcoskit.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not come of `create_model`"):
        bcoskit.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "new" / "one")
    with pytest.raises(TypeError, match=r"`training` .* must hold plain values"):
        bcoskit.save_pretrained(network, tmp_path / "new" / "one", training={"path": tmp_path})
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"`revision` \(='main'\) must be None"):
        bcoskit.from_pretrained(tmp_path, revision="main")
    with pytest.raises(ValueError, match="'' is neither a folder"):
        bcoskit.from_pretrained("")


def test_offline(network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"(?i)user/name cannot be had from the hub: .*offline"):
        bcoskit.from_pretrained("user/name")
    with pytest.raises(ConnectionError, match=r"(?i)user/name cannot be uploaded to the hub: .*offline"):
        bcoskit.push_to_hub(network, "user/name")


def test_upload(network, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, **options):
            calls["api"] = options

        def model_info(self, repo_id, **options):
            calls["asked"] = repo_id, options

        def create_repo(self, repo_id, **options):
            calls["create"] = repo_id, options

        def upload_folder(self, *, repo_id, folder_path):
            opened = bcoskit.from_pretrained(folder_path)
            assert torch.equal(opened.layers[0].weight, network.layers[0].weight)
            return type("Commit", (), {"commit_url": f"https://example.org/{repo_id}"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    url = bcoskit.push_to_hub(network, "user/name", private=True, token="secret")
    assert url == "https://example.org/user/name"
    assert calls["asked"] == ("user/name", {"timeout": 10})
    assert calls["create"] == ("user/name", {"private": True, "exist_ok": True})
    assert calls["api"]["token"] == "secret"


def test_files_in_the_place_of_folders(network, tmp_path):
    file = tmp_path / "model.safetensors"
    save_model(network, file)
    with pytest.raises(ValueError, match="is a file, which `create_model` opens"):
        bcoskit.from_pretrained(file)
    with pytest.raises(ValueError, match=r"`folder` \(=.*\) is a file"):
        bcoskit.save_pretrained(network, file)
