"""The Lightning modules: what is trained, by which loss, and what happens to a batch of pixels."""

import random
import warnings
from functools import partial
from typing import Any, TypeAlias

import lightning
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torchmetrics.classification import MulticlassAccuracy

from bcoskit.convert import GradualConversion
from bcoskit.data import ImageTransform
from bcoskit.training._augment import augment, mixed
from bcoskit.training._finetune import FineTuning, parameter_groups
from bcoskit.training._losses import classification_loss
from bcoskit.training._options import Augmentation, Loss, Optimization

Batch: TypeAlias = tuple[Tensor, Tensor]

_USUAL, _ALL_ALIKE = Optimization(), FineTuning()


def seed_of(*key: int) -> int:
    """A seed that the key determines, on every machine."""
    return random.Random(repr(key)).getrandbits(63)


def seeded(*key: int) -> torch.Generator:
    """A source of random numbers that the key determines, on every machine."""
    return torch.Generator().manual_seed(seed_of(*key))


class Learner(lightning.LightningModule):
    """A network that is trained.

    Args:
        model: The network.
        learning_rate: At the start, after the warm-up.
        optimization: Optimiser, schedule and clipping.
        seed: With epoch and batch it determines the augmentation, so that a resumed run repeats nothing.
        fine_tuning: How the learning rates of layers differ.
        gradual: The conversion in which the network is, None if it is in none.
        gradual_part: The part of all steps in which that conversion is carried out, above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        seed: int,
        optimization: Optimization = _USUAL,
        fine_tuning: FineTuning = _ALL_ALIKE,
        gradual: GradualConversion | None = None,
        gradual_part: float = 1.0,
    ) -> None:
        super().__init__()
        self.optimization = optimization
        self.fine_tuning = fine_tuning
        self.model = model.to(memory_format=torch.channels_last)
        self.learning_rate = learning_rate
        self.seed = seed
        self._gradual, self._gradual_part = gradual, gradual_part
        self._latest: tuple[Any, int] = ((), 0)
        self._before_the_first: dict[str, Tensor] | None = None
        self._all_steps: int | None = None

    def batch_loss(self, batch: Any, batch_index: int) -> Tensor:
        """The loss of one augmented batch, by the compiled network if there is one."""
        raise NotImplementedError

    def uncompile(self) -> None:
        """Go on without compiled networks."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The loss of one augmented batch.

        Raises:
            RuntimeError: If it is not finite, before the step that it would spoil.
        """
        self._latest = (batch, batch_index)
        if self._before_the_first is None:
            self._before_the_first = {name: buffer.clone() for name, buffer in self.named_buffers()}
        try:
            loss = self.batch_loss(batch, batch_index)
        except TorchDynamoException as error:
            loss = self._uncompiled_loss(error)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def backward(self, loss: Tensor, *_arguments: Any, **_keywords: Any) -> None:
        """The gradients; if a compiler fails at them, those of the network as it is."""
        try:
            loss.backward()
        except TorchDynamoException as error:
            self._uncompiled_loss(error).backward()
        self._before_the_first = {}

    def _uncompiled_loss(self, error: TorchDynamoException) -> Tensor:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"the training step is not compiled: {reason}", stacklevel=2)
        self.uncompile()
        with torch.no_grad():  # what the first pass has written to running statistics is not written twice
            for name, value in (self._before_the_first or {}).items():
                self.get_buffer(name).copy_(value)
        return self.batch_loss(*self._latest)

    def configure_optimizers(self) -> Any:
        """The optimiser, and the schedule of its learning rate."""
        options = self.optimization
        trained = parameter_groups(self.model, self.fine_tuning, self.learning_rate)
        common: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": options.weight_decay}
        if options.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, momentum=options.momentum, **common)
        else:
            kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
            optimizer = kind(trained, **common)
        epochs = self.trainer.max_epochs or 1
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(options.factor, steps_per_epoch=-(-self._steps() // epochs), epochs=epochs)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_arguments: Any, **_keywords: Any) -> None:
        """Clip the gradients, if that is wanted."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.optimization.clip == "agc":
            adaptive_clip_grad(parameters, self.optimization.clip_at)
        elif self.optimization.clip == "norm":
            torch.nn.utils.clip_grad_norm_(parameters, self.optimization.clip_at)

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
        loss: What is minimised; what is measured on test images is its kind alone, with targets 0 and 1.
        augmentation: Of training images.
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
        augmentation: Augmentation,
        compile_step: bool,
        **arguments: Any,
    ) -> None:
        super().__init__(model, **arguments)
        self.transform = transform
        self.num_classes = num_classes
        self.loss = loss
        self.augmentation = augmentation
        # In a list, so that the network is not registered, and saved, a second time.
        self._for_training = [torch.compile(model) if compile_step else model]
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def uncompile(self) -> None:
        """Go on with the network as it is."""
        self._for_training[0] = self.model

    def batch_loss(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of one augmented batch.

        Raises:
            RuntimeError: If it is not finite, before the step that it would spoil.
        """
        images, labels = batch
        key = (self.seed, self.current_epoch, batch_index)
        repeats = self.augmentation.repeats
        if repeats > 1:
            count = len(images) // repeats
            images, labels = images[:count].repeat_interleave(repeats, 0), labels[:count].repeat_interleave(repeats, 0)
        x = encoded(augment(images, self.augmentation, seeded(*key)), self.transform)
        x, targets = mixed(x, labels, self.num_classes, self.augmentation, seed_of(*key))
        outputs = self._for_training[0](x)
        # Beside its logits an Inception network returns those of its auxiliary classifier.
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        losses = [self._loss(logits, targets), *(self.loss.auxiliary * self._loss(each, targets) for each in auxiliary)]
        return torch.stack(losses).sum()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Loss and accuracy of one batch.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        images, labels = batch
        logits = self.model(encoded(images, self.transform))
        self.accuracy(logits, labels)
        loss = self.checked(classification_loss(logits, labels, Loss(self.loss.kind)))
        self.log("test_loss", loss, batch_size=len(labels))
        self.log("test_accuracy", self.accuracy, prog_bar=True, on_step=False, on_epoch=True)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.checked(classification_loss(logits, labels, self.loss))


def encoded(images: Tensor, transform: ImageTransform) -> Tensor:
    """Pixels as the input of a network, channels last."""
    return transform.encode_pixels(images).contiguous(memory_format=torch.channels_last)
