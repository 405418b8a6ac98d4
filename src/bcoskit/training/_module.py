"""The Lightning modules: what is trained, by which loss, and what happens to a batch of pixels."""

import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import lightning
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy, MultilabelAveragePrecision

from bcoskit.convert import GradualConversion
from bcoskit.data import ImageError, ImageTransform
from bcoskit.models import Network
from bcoskit.nn._base import BcosArguments
from bcoskit.nn._norm import RunningNorm
from bcoskit.training._augment import augment, mixed
from bcoskit.training._finetune import FineTuning, parameter_groups
from bcoskit.training._losses import classification_loss
from bcoskit.training._options import Augmentation, Hardware, Loss, Optimization
from bcoskit.training._recompute import keep_stages, recompute_stages

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
        model: Network,
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
        self._returned = torch.tensor(0.0)
        self._before_the_first: dict[str, Tensor] | None = None
        self._norms = {each: each.synchronized for each in model.modules() if isinstance(each, RunningNorm)}
        layers = (each for each in model.modules() if isinstance(each, BcosArguments))
        self._exponents = [layer.b for layer in layers if isinstance(layer.b, Tensor) and layer.b.requires_grad]
        self._steps = 0
        self._part = (0, 1)
        self._recompute = False
        self.repeats = 1
        self._unreadable: Callable[[str], object] | None = None

    def prepare(
        self, steps: int, part: tuple[int, int], unreadable: Callable[[str], object], hardware: Hardware
    ) -> None:
        """Before a run begins or goes on.

        Args:
            steps: Of the optimiser, in all epochs together.
            part: Index and number of the processes.
            unreadable: Called with a line for each image that cannot be read.
            hardware: What it is computed with.
        """
        self._steps, self._part, self._unreadable = steps, part, unreadable
        self._recompute = hardware.recompute
        for norm in self._norms:
            norm.synchronized = part[1] > 1
        if hardware.recompute:
            recompute_stages(self.model)

    def release(self) -> None:
        """After a run: the network as it was before `prepare`, but for its weights."""
        for norm, before in self._norms.items():
            norm.synchronized = before
        keep_stages(self.model)

    def configure_model(self) -> None:
        """Share out the weights, if that is wanted."""
        if self.device_mesh is None or any(isinstance(each, DTensor) for each in self.model.parameters()):
            return
        self.model.to(memory_format=torch.contiguous_format)  # the only one that can be shared out
        mesh = self.device_mesh["data_parallel"]
        modules = dict(self.model.named_modules())
        for path in self.model.stage_names:
            fully_shard(modules[path], mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def collect(self) -> None:
        """Bring weights that are shared out together in each process."""
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    module.register_parameter(name, nn.Parameter(parameter.full_tensor()))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch, of which images that could not be read are told; in training others take their places.

        Raises:
            ImageError: If more images cannot be read than are allowed, or none of a training batch can.
        """
        if len(batch) != 3 or not isinstance(batch[2], list):
            return batch
        images, labels, lines = batch
        for line in lines:
            assert self._unreadable is not None
            self._unreadable(f"{'train' if self.trainer.training else 'test'}: {line}")
        if lines and self.trainer.training:
            if not len(images):
                raise ImageError(f"none of the images of a batch can be read: {lines[0]}")
            places = torch.arange(len(images) + len(lines), device=images.device) % len(images)
            images, labels = images[places], labels[places]
        return images, labels

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
        # Of dropout and stochastic depth.
        torch.manual_seed(seed_of(self.seed, self.current_epoch, batch_index, self._part[0]))
        if self._before_the_first is None:
            self._before_the_first = {name: buffer.clone() for name, buffer in self.named_buffers()}
        try:
            loss = self.batch_loss(batch, batch_index)
        except TorchDynamoException as error:
            loss = self._uncompiled_loss(error)
        self.log("train_loss", loss, prog_bar=True)
        self._returned = loss.detach()
        return loss

    def backward(self, loss: Tensor, *_arguments: Any, **_keywords: Any) -> None:
        """The gradients; if a compiler fails at them, those of the network as it is."""
        try:
            loss.backward()
        except TorchDynamoException as error:
            # Lightning divides what the step has returned by the batches of an update, and scales it in half precision.
            factor = torch.where(self._returned == 0, 1.0, loss.detach() / self._returned)
            self._uncompiled_loss(error).backward(factor)
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
            optimizer, partial(options.factor, steps_per_epoch=self._steps // epochs, epochs=epochs)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_arguments: Any, **_keywords: Any) -> None:
        """Clip the gradients, if that is wanted."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.optimization.clip == "agc":
            adaptive_clip_grad(parameters, self.optimization.clip_at)
        elif self.optimization.clip == "norm":
            torch.nn.utils.clip_grad_norm_(parameters, self.optimization.clip_at)

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        """A step, after which learnable exponents are at least 1: below it the transform has no bound."""
        super().optimizer_step(*arguments, **keywords)
        with torch.no_grad():
            for exponent in self._exponents:
                exponent.clamp_(min=1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Bring a gradual conversion to where it is at this step."""
        self.move(self.global_step)

    def on_validation_start(self) -> None:
        """Measure, and save, the network as far as the steps have brought it."""
        self.move(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring a gradual conversion to where it was, before the weights come.

        Raises:
            ValueError: If these are not those of the network.
        """
        self.move(checkpoint["global_step"])
        expected, found = self.state_dict(), checkpoint["state_dict"]
        for name in (*expected, *found):
            if getattr(expected.get(name), "shape", None) != getattr(found.get(name), "shape", None):
                raise ValueError(
                    f"{self.trainer.ckpt_path}: does not fit the network, {name!r} is missing, unknown or of another "
                    "shape"
                )

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

    def move(self, step: int) -> None:
        """Bring a gradual conversion to where it is at a step."""
        if self._gradual is None:
            return
        progress = min(step / (self._gradual_part * self._steps), 1.0)
        if progress < 1:
            self._gradual.set(progress)
        elif self._gradual.progress < 1:
            keep_stages(self.model)  # the modules are walked in step with those of the network that it becomes
            self._gradual.finish()
            if self._recompute:
                recompute_stages(self.model)


class Classifier(Learner):
    """Trains a network on batches of uint8 images and labels.

    Args:
        model: From encoded images to logits (N, num_classes).
        transform: Its transform, of which the last step, from pixels to the network's input, is done by the batch.
        num_classes: Number of logits.
        loss: What is minimised; what is measured on test images is its kind alone, with targets 0 and 1.
        augmentation: Of training images.
        compile_step: Whether the network is compiled for training.
        multi_label: Whether labels are zeros and ones (N, num_classes).
        arguments: Of `Learner`.
    """

    def __init__(
        self,
        model: Network,
        transform: ImageTransform,
        num_classes: int,
        *,
        loss: Loss,
        augmentation: Augmentation,
        compile_step: bool,
        multi_label: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(model, **arguments)
        self.transform = transform
        self.num_classes = num_classes
        self.loss = loss
        self.augmentation = augmentation
        self.repeats = augmentation.repeats
        # In a list, so that the network is not registered, and saved, a second time.
        self._for_training = [torch.compile(model) if compile_step else model]
        self.mean_loss = MeanMetric()
        self.precision: MultilabelAveragePrecision | None = None
        if multi_label:
            self.accuracy: Any = MultilabelAccuracy(num_classes, average="micro")
            self.precision = MultilabelAveragePrecision(num_classes)
        else:
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
        x = encoded(augment(images, self.augmentation, seeded(*key), self._part), self.transform)
        pairs = key if self._part[1] == 1 else (*key, self._part[0])
        x, targets = mixed(x, labels, self.num_classes, self.augmentation, seed_of(*pairs))
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
        if not len(images):  # none of them can be read
            return
        logits = self.model(encoded(images, self.transform))
        classes = labels.long()
        # Probabilities, since the metrics take numbers that happen to lie between 0 and 1 for such.
        scores = logits if self.precision is None else logits.float().sigmoid()
        self.accuracy(scores, classes)
        loss = self.checked(classification_loss(logits, labels, Loss(self.loss.kind)))
        # By the number of images, which Lightning would round to whole ones for each process.
        self.mean_loss(loss, len(labels))
        self.log("test_loss", self.mean_loss, on_step=False, on_epoch=True)
        self.log("test_accuracy", self.accuracy, prog_bar=True, on_step=False, on_epoch=True)
        if self.precision is not None:
            self.precision(scores, classes)
            self.log("test_mean_average_precision", self.precision, on_step=False, on_epoch=True)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.checked(classification_loss(logits, labels, self.loss))


def encoded(images: Tensor, transform: ImageTransform) -> Tensor:
    """Pixels as the input of a network, channels last."""
    return transform.encode_pixels(images).contiguous(memory_format=torch.channels_last)
