"""The Lightning module: a classifier, its loss, its optimiser, and what happens to a batch of pixels."""

import random
from typing import Any, TypeAlias

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from bcoskit.data import ImageTransform, random_crop_flip
from bcoskit.models import Loss

Batch: TypeAlias = tuple[Tensor, Tensor]


def seeded(*key: int) -> torch.Generator:
    """A source of random numbers that the key determines, on every machine."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


class Classifier(lightning.LightningModule):
    """Trains a network on batches of uint8 images and labels.

    Args:
        model: From encoded images to logits (N, num_classes).
        transform: Its transform, of which the last step, from pixels to the network's input, is done by the batch.
        num_classes: Number of logits.
        loss: `"bce"`, binary cross-entropy with one-hot targets, averaged over samples and classes, or
            `"cross_entropy"`.
        learning_rate: Of Adam at the start; a cosine per step takes it to 0.
        seed: With epoch and batch it determines the augmentation, so that a resumed run repeats nothing.
        compile_step: Whether the network is compiled for training.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: ImageTransform,
        num_classes: int,
        *,
        loss: Loss,
        learning_rate: float,
        seed: int,
        compile_step: bool,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.transform = transform
        self.num_classes = num_classes
        self.loss = loss
        self.learning_rate = learning_rate
        self.seed = seed
        # In a list, so that the network is not registered, and saved, a second time.
        self._for_training = [torch.compile(model) if compile_step else model]
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of one augmented batch.

        Raises:
            RuntimeError: If it is not finite, before the step that it would spoil.
        """
        images, labels = batch
        generator = seeded(self.seed, self.current_epoch, batch_index)
        outputs = self._for_training[0](self._encoded(random_crop_flip(images, generator=generator)))
        # Beside its logits an Inception network returns those of its auxiliary classifier.
        every = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = torch.stack([self._loss(logits, labels) for logits in every]).sum()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and accuracy of one batch.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        images, labels = batch
        logits = self.model(self._encoded(images))
        self.accuracy(logits, labels)
        self.log("test_loss", self._loss(logits, labels), batch_size=len(labels))
        self.log("test_accuracy", self.accuracy, prog_bar=True, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Adam without weight decay, and the cosine."""
        optimizer = torch.optim.Adam(self.model.parameters(), self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _encoded(self, images: Tensor) -> Tensor:
        return self.transform.encode_pixels(images).contiguous(memory_format=torch.channels_last)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            loss = F.cross_entropy(logits, labels)
        else:
            targets = F.one_hot(labels, self.num_classes).to(logits.dtype)
            loss = F.binary_cross_entropy_with_logits(logits, targets)
        if not bool(loss.isfinite()):
            raise RuntimeError(
                f"the loss is {float(loss.detach())} in epoch {self.current_epoch + 1}: "
                f"`learning_rate` (={self.learning_rate}) is too high for this network and these images"
            )
        return loss
