"""Networks of Hugging Face: classifiers of text, explained token by token from their embeddings, and of images."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import bcoskit
from bcoskit.convert import BcosConfig, bcosify

TEXT = BcosConfig(encode=False, classifier="keep")
EXACT = BcosConfig(b=1.0, biases="keep", norms="keep", encode=False, classifier="keep")


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)), "bert.embeddings"


def distilbert():
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    config = DistilBertConfig(vocab_size=50, num_labels=3, **sizes)
    return DistilBertForSequenceClassification(config), "distilbert.embeddings"


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
    config = GPT2Config(vocab_size=50, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    return GPT2ForSequenceClassification(config), "transformer"


@pytest.fixture(params=[bert, distilbert, gpt2], ids=["bert", "distilbert", "gpt2"])
def classifier(request):
    torch.manual_seed(0)
    network, embeddings = request.param()
    with torch.no_grad():
        for parameter in network.parameters():  # as large as training makes them
            parameter.normal_(std=0.2)
    name = "wte" if embeddings == "transformer" else "word_embeddings"
    return network.eval(), f"{embeddings}.{name}"


@pytest.fixture
def tokens():
    return torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def test_the_exact_start(classifier, tokens):
    network, _ = classifier
    converted = bcosify(network, EXACT, example=tokens)
    with torch.no_grad():
        expected, found = network(tokens).logits, converted(tokens).logits
        moved = bcosify(network, TEXT, example=tokens)(tokens).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(moved, expected, rtol=1e-2)


def test_explanations_per_token(classifier, tokens):
    network, embeddings = classifier
    converted = bcosify(network, TEXT, example=tokens)
    found = bcoskit.explain(converted, tokens, from_layer=embeddings, channel_dim=-1, shares=True)
    assert found.contributions.shape == (2, 7)
    assert float(found.residual.abs().max()) < 1e-5
    assert torch.allclose(found.logits, converted(tokens).logits)
    total = found.contributions.sum(1) + sum(found.shares.values())
    assert torch.allclose(total, found.value, rtol=1e-4, atol=1e-6)
    both = bcoskit.explain(converted, tokens, torch.tensor([[0, 1], [2, 0]]), from_layer=embeddings, channel_dim=-1)
    assert both.contributions.shape == (2, 2, 7)


def test_the_audit(classifier, tokens):
    network, embeddings = classifier
    converted = bcosify(network, TEXT, example=tokens)
    report = bcoskit.audit(converted, tokens, from_layer=embeddings)
    assert report.passed
    assert any("position" in name or "wpe" in name for name in report.shares)

    class Digamma(nn.Module):
        def forward(self, x):
            return torch.special.digamma(x.abs() + 1)

    head = "score" if hasattr(converted, "score") else "classifier"
    setattr(converted, head, nn.Sequential(Digamma(), getattr(converted, head)).eval())
    report = bcoskit.audit(converted, tokens, from_layer=embeddings)
    assert not report.passed
    assert report.offenders[0].module == f"{head}.0"


def test_layers_of_gpt(tokens):
    report = bcosify(gpt2()[0].eval(), BcosConfig(encode=False, activations="drop"), example=tokens).conversion
    found = {each.path.rpartition(".")[2]: each.detail for each in report.of("replaced")}
    assert found == {"c_attn": "Linear", **dict.fromkeys(("c_proj", "c_fc", "score"), "BcosLinear"), "act": "Identity"}
    assert report.of("left") == ()


def test_tokens_need_a_layer_to_start_from(classifier, tokens):
    network, _ = classifier
    with pytest.raises(TypeError, match="from_layer"):
        bcoskit.explain(network, tokens)
    with pytest.raises(TypeError, match="from_layer"):
        bcoskit.audit(network, tokens)
    with pytest.raises(ValueError, match="no layer"):
        bcoskit.explain(network, tokens, from_layer="nothing")


def test_images():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    network = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **sizes)).eval()
    images = torch.rand(2, 3, 32, 32)
    x = bcoskit.encode(images)
    exact = bcosify(network, BcosConfig.preset("exact"), example=images)
    with torch.no_grad():
        assert torch.allclose(exact(x).logits, network(images).logits, rtol=1e-5, atol=1e-6)
    converted = bcosify(network, example=images)
    assert bcoskit.audit(converted, x).passed
    assert bcoskit.explain(converted, x).contributions.shape == (2, 32, 32)
