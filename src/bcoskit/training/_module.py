"""The Lightning modules: what is trained, by which loss, and what happens to a batch of pixels."""

import random
from typing import Any, TypeAlias

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from bcoskit.convert import GradualConversion
from bcoskit.data import ImageTransform, random_crop_flip
from bcoskit.models import Loss

Batch: TypeAlias = tuple[Tensor, Tensor]


def seed_of(*key: int) -> int:
    """A seed that the key determines, on every machine."""
    return random.Random(repr(key)).getrandbits(63)


def seeded(*key: int) -> torch.Generator:
    """A source of random numbers that the key determines, on every machine."""
    return torch.Generator().manual_seed(seed_of(*key))


class Learner(lightning.LightningModule):
    """A network that is trained by Adam without weight decay, with a cosine per step from the learning rate to 0.

    Args:
        model: The network.
        learning_rate: Of Adam at the start.
        seed: With epoch and batch it determines the augmentation, so that a resumed run repeats nothing.
        gradual: The conversion in which the network is, None if it is in none.
        gradual_part: The part of all steps in which that conversion is carried out, above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        seed: int,
        gradual: GradualConversion | None = None,
        gradual_part: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.learning_rate = learning_rate
        self.seed = seed
        self._gradual, self._gradual_part = gradual, gradual_part
        self._all_steps: int | None = None

    def configure_optimizers(self) -> Any:
        """Adam without weight decay, and the cosine."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self._steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Move a gradual conversion to where it should be at this step."""
        self._move(self.global_step)

    def on_validation_start(self) -> None:
        """Measure, and save, the network as far as the steps have brought it."""
        self._move(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring a gradual conversion to where it was, before the weights come."""
        self._move(int(checkpoint["global_step"]))

    def checked(self, loss: Tensor) -> Tensor:
        """The loss itself.

        Raises:
            RuntimeError: If it is not finite, before the step that it would spoil.
        """
        if not bool(loss.isfinite()):
            raise RuntimeError(
                f"the loss is {float(loss.detach())} in epoch {self.current_epoch + 1}: "
                f"`learning_rate` (={self.learning_rate}) is too high for this network and these images"
            )
        return loss

    def _move(self, step: int) -> None:
        if self._gradual is None:
            return
        progress = min(step / (self._gradual_part * self._steps()), 1.0)
        if progress == 1:
            self._gradual.finish()
        else:
            self._gradual.set(progress)

    def _steps(self) -> int:
        if self._all_steps is None:  # Lightning knows it while it fits, and not while it only measures
            self._all_steps = int(self.trainer.estimated_stepping_batches)
        return self._all_steps


class Classifier(Learner):
    """Trains a network on batches of uint8 images and labels.

    Args:
        model: From encoded images to logits (N, num_classes).
        transform: Its transform, of which the last step, from pixels to the network's input, is done by the batch.
        num_classes: Number of logits.
        loss: `"bce"`, binary cross-entropy with one-hot targets, averaged over samples and classes, or
            `"cross_entropy"`.
        compile_step: Whether the network is compiled for training.
        arguments: Of `Learner`.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: ImageTransform,
        num_classes: int,
        *,
        loss: Loss,
        compile_step: bool,
        **arguments: Any,
    ) -> None:
        super().__init__(model, **arguments)
        self.transform = transform
        self.num_classes = num_classes
        self.loss = loss
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
        # The recipes shift images of 32 pixels by up to 4.
        padding = max(images.shape[-1] // 8, 1)
        augmented = random_crop_flip(images, padding, generator=generator)
        outputs = self._for_training[0](encoded(augmented, self.transform))
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
        logits = self.model(encoded(images, self.transform))
        self.accuracy(logits, labels)
        self.log("test_loss", self._loss(logits, labels), batch_size=len(labels))
        self.log("test_accuracy", self.accuracy, prog_bar=True, on_step=False, on_epoch=True)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return self.checked(F.cross_entropy(logits, labels))
        targets = F.one_hot(labels, self.num_classes).to(logits.dtype)
        return self.checked(F.binary_cross_entropy_with_logits(logits, targets))


def encoded(images: Tensor, transform: ImageTransform) -> Tensor:
    """Pixels as the input of a network, channels last."""
    return transform.encode_pixels(images).contiguous(memory_format=torch.channels_last)
