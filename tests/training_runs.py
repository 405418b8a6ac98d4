"""Training runs in tests: small images, comparisons of what came out, and power cuts."""

import random

import torch
from PIL import Image

from bcoskit.models import create_model
from bcoskit.training._module import Classifier

COLORS = {"green": (30, 200, 30), "red": (200, 30, 30)}


def write_images(root, split, count, colors=COLORS):
    """Images of one colour, a little different each; the colour is the class."""
    source = random.Random(split)
    for name, color in colors.items():
        place = root / split / name
        place.mkdir(parents=True)
        for index in range(count):
            shade = tuple(value + source.randint(-20, 20) for value in color)
            Image.new("RGB", (32, 32), shade).save(place / f"{index}.png")


def state_of(out):
    return create_model(out / "model.safetensors").state_dict()


def same_weights(first, second):
    first, second = state_of(first), state_of(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def break_off(monkeypatch, epoch, batch=0, error=OSError):
    """Make training stop at a step, as if the machine had."""
    step = Classifier.training_step

    def broken(self, images_and_labels, index):
        if (self.current_epoch, index) == (epoch, batch):
            raise error("power cut")
        return step(self, images_and_labels, index)

    monkeypatch.setattr(Classifier, "training_step", broken)
