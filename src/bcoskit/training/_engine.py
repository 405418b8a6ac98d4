"""Lightning, as this package uses it."""

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.accelerators.cpu import CPUAccelerator
from lightning.pytorch.callbacks import (
    Checkpoint,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console
from torch.utils.data import DataLoader

from bcoskit._files import whole_file
from bcoskit._processes import started
from bcoskit.data import StreamedImages
from bcoskit.training._folder import CHECKPOINT
from bcoskit.training._loading import Batches, Images, Unreadable, batches
from bcoskit.training._module import Learner
from bcoskit.training._options import Hardware, Loading


@dataclass(frozen=True)
class Machinery:
    """What a run is computed with, and where it is logged.

    Attributes:
        hardware: Devices, strategy, precision.
        loading: How images are read.
        wandb: Project of Weights & Biases, None for none.
        checkpoint_every: Steps from one checkpoint within an epoch to the next, 0 for none.
    """

    hardware: Hardware
    loading: Loading
    wandb: str | None = None
    checkpoint_every: int = 0


def fit(
    learner: Learner,
    train_images: Images,
    test_images: Images,
    *,
    batch_size: int,
    out: Path,
    epochs: int,
    resumed: bool,
    unreadable: Unreadable,
    machinery: Machinery,
    measure_every: int = 1,
    callbacks: Sequence[lightning.Callback] = (),
) -> dict[str, float]:
    """Train to the last epoch.

    Args:
        learner: What is trained.
        train_images: Of one epoch.
        test_images: What is measured on.
        batch_size: Images per batch of all processes together; the rest of an epoch that fills no batch, or not as many
            batches as are accumulated, is left out.
        out: Folder of the run.
        epochs: How many.
        resumed: Whether it goes on from the checkpoint in `out`.
        unreadable: Where images that cannot be read are counted.
        machinery: What it is computed with.
        measure_every: Epochs from one measurement to the next; after the last one there always is one.
        callbacks: Of Lightning, beside its own.

    Returns:
        What was measured after the last epoch, by names that begin with `test_`.

    Raises:
        ValueError: If the batch cannot be shared out to the processes, or there are no such devices.
        OSError: If the folder cannot be written to, such as on a full disk.
    """
    hardware, loading = machinery.hardware, machinery.loading
    updates = len(train_images) // (batch_size * learner.optimization.accumulate)
    with torch.random.fork_rng(devices=()), _quiet(), _interruptible():
        trainer = _trainer(out, epochs, updates, measure_every, learner, callbacks, machinery)
        part = (trainer.global_rank, trainer.world_size)
        _check_processes(trainer.world_size)
        data = Data(train_images, test_images, batch_size, learner, loading.workers, part)
        # Lightning knows this too, but asking it makes the first loader before it knows where a run goes on.
        learner.prepare(epochs * updates, part, unreadable.add, hardware)
        try:
            checkpoint = out / CHECKPOINT if resumed else None
            trainer.fit(learner, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            measured = trainer.callback_metrics
            # Of a run that had reached its last epoch before, or has not measured after it.
            if not measured or epochs % measure_every:
                if not data.has_trained:
                    trainer.loggers = []  # they have these figures
                measured = trainer.validate(learner, datamodule=data, verbose=False)[0]
            learner.collect()
            if resumed and learner.optimization.ema is not None and not data.has_trained:
                # What the callback puts into the network in the end of a run, and not in one that had ended before.
                average = torch.load(out / CHECKPOINT, map_location="cpu", weights_only=True)["state_dict"]
                learner.load_state_dict(average)
        except OSError as error:
            if error.strerror is None or error.filename is not None:
                raise
            kept = "; the last checkpoint stays, `resume` goes on from there" if (out / CHECKPOINT).exists() else ""
            raise OSError(error.errno, f"cannot be written to ({error.strerror}){kept}", str(out)) from error
        finally:
            learner.release()
    return {name: float(value) for name, value in measured.items() if name.startswith("test_")}


class Data(lightning.LightningDataModule):
    """The batches of one process; a loader of its own for each epoch, whose order is part of it.

    Args:
        train_images: Of one epoch.
        test_images: What is measured on.
        batch_size: Images per step of all processes together.
        learner: Whose seed and options determine the order.
        workers: Processes that read images from disk, None for a number that fits.
        part: Index and number of the processes.
    """

    def __init__(
        self,
        train_images: Images,
        test_images: Images,
        batch_size: int,
        learner: Learner,
        workers: int | None,
        part: tuple[int, int],
    ) -> None:
        super().__init__()
        self.has_trained = False
        self._images, self._batch_size, self._learner = (train_images, test_images), batch_size, learner
        self._workers, self._part = workers, part
        self._train_order(0)  # what cannot be shared out is told of before anything begins

    def train_dataloader(self) -> DataLoader[Any]:
        """Of the epoch that comes next."""
        assert self.trainer is not None
        # `current_epoch` is one too few here when a run is resumed.
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        epoch: int = progress.processed
        # Those of an epoch that ended, or of one within which a checkpoint was written.
        within: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        seen: int = within.processed
        self.has_trained = epoch < (self.trainer.max_epochs or 0)
        images = self._images[0]
        if isinstance(images, StreamedImages):
            images.set_epoch(epoch)
        order = self._train_order(epoch, seen % len(self._train_order(epoch)))
        return batches(images, order, self._workers, self._part[1])

    def val_dataloader(self) -> DataLoader[Any]:
        """Of the test images."""
        order = Batches(len(self._images[1]), 4 * self._batch_size, self._part)
        return batches(self._images[1], order, self._workers, self._part[1])

    def _train_order(self, epoch: int, begin: int = 0) -> Batches:
        key = (self._learner.seed, epoch)
        group = self._learner.optimization.accumulate
        return Batches(len(self._images[0]), self._batch_size, self._part, key, self._learner.repeats, begin, group)


class WithinEpochs(Checkpoint):
    """Writes the checkpoint of a run between the ends of its epochs.

    Args:
        every: Steps of the optimiser from one checkpoint to the next.
        path: Of the checkpoint.
    """

    def __init__(self, every: int, path: Path) -> None:
        self._every, self._path = every, path

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *arguments: Any, **keywords: Any
    ) -> None:
        """Write it, if it is time to; not after the last batch, since the end of the epoch writes one as well."""
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        done: int = progress.processed
        # Gradients that are still accumulated are in no checkpoint.
        if done % trainer.accumulate_grad_batches or done == trainer.num_training_batches:
            return
        if trainer.global_step % self._every == 0:
            assert isinstance(pl_module, Learner)
            pl_module.move(trainer.global_step)
            trainer.save_checkpoint(self._path)


def _check_processes(count: int) -> None:
    """Raise if a launcher has started other processes than those that know of each other."""
    if started() not in (1, count):
        raise ValueError(
            f"{started()} processes were started, and `hardware` is for {count}: "
            "give `hardware.devices` and `hardware.nodes`"
        )


def can_compile() -> bool:
    """Whether a compiler is at hand, found out by compiling something small."""
    try:
        torch.compile(torch.sin)(torch.zeros(1))
    except Exception as error:  # every backend has failures of its own, and all mean the same
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"the training step is not compiled: {reason}", stacklevel=3)
        return False
    return True


def _trainer(
    out: Path,
    epochs: int,
    updates: int,
    measure_every: int,
    learner: Learner,
    callbacks: Sequence[lightning.Callback],
    machinery: Machinery,
) -> lightning.Trainer:
    optimization = learner.optimization
    averages: list[Any] = []
    if optimization.ema is not None:
        averages.append(EMAWeightAveraging(decay=optimization.ema, update_every_n_steps=optimization.ema_every))
    loggers: list[Logger] = [CSVLogger(out, "csv"), TensorBoardLogger(out, "tensorboard", "")]
    if machinery.wandb is not None:
        loggers.append(_wandb(machinery.wandb, out))
    hardware, every = machinery.hardware, machinery.checkpoint_every
    strategy: Any = hardware.strategy
    precision: Any = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[hardware.precision]
    if strategy == "fsdp":
        devices = torch.accelerator.device_count() if hardware.devices == -1 else hardware.devices
        strategy = ModelParallelStrategy(devices * hardware.nodes, 1, save_distributed_checkpoint=False)
    elif learner.fine_tuning.frozen_epochs is not None and (hardware.devices, hardware.nodes) != (1, 1):
        strategy = "ddp_find_unused_parameters_true"  # of layers that are frozen at first
    console = Console(stderr=True)
    shown = console.is_terminal or console.is_jupyter
    try:
        trainer = lightning.Trainer(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            num_nodes=hardware.nodes,
            strategy=strategy,
            precision=precision,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
            default_root_dir=out,
            max_epochs=epochs,
            accumulate_grad_batches=optimization.accumulate,
            logger=loggers,
            plugins=[WholeFiles()],
            callbacks=[
                ModelCheckpoint((out / CHECKPOINT).parent, CHECKPOINT.stem, enable_version_counter=False),
                *([WithinEpochs(every, out / CHECKPOINT)] if every else []),
                LearningRateMonitor("epoch"),
                *callbacks,  # first, since they are to look at the average
                *averages,
                *([RichProgressBar(console_kwargs={"stderr": True})] if shown else []),
            ],
            enable_progress_bar=shown,
            inference_mode=False,  # in which nothing can be explained
            log_every_n_steps=min(50, updates),
            num_sanity_val_steps=0,
            check_val_every_n_epoch=measure_every,
            enable_model_summary=False,
        )
    except (MisconfigurationException, RuntimeError, ImportError) as error:
        raise ValueError(f"`hardware` (={hardware}) is not to be had: {' '.join(str(error).split())}") from error
    if hardware.precision == "16" and isinstance(trainer.accelerator, CPUAccelerator):
        raise ValueError("`precision` (='16') needs a GPU: take 'bf16'")
    return trainer


def _wandb(project: str, out: Path) -> Logger:
    try:
        return WandbLogger(project=project, save_dir=out, name=out.name, resume="allow")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`wandb` needs a package of that name: pip install wandb") from error


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints that appear complete or not at all, whatever happens while they are written."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any | None = None) -> None:
        """To a file beside it, to the disk, and then in its place.

        Raises:
            OSError: If it cannot be written; what was there before stays.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            reason = _of_the_system(error) or " ".join(str(error).split())
            kept = "; the one before it stays, `resume` goes on from there" if path.exists() else ""
            raise OSError(f"{path}: the checkpoint cannot be written ({reason}){kept}") from error


def _of_the_system(error: BaseException | None) -> str | None:
    """What the operating system said first, such as that a disk is full; torch hides it behind an error of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror is not None:
            return error.strerror
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice on other products, on workers, and on the folder of a run, which may have moved."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", "The dirpath has changed")
        warnings.filterwarnings("ignore", "You have overridden `on_after_batch_transfer`")  # there is only one
        warnings.filterwarnings("ignore", "You're using the WeightAveraging callback")  # weights are not shared out
        warnings.filterwarnings("ignore", ".* but AMP with fp16 is not supported on CPU")  # that is refused
        # Lightning 2.6 with torch 2.14
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.pytorch\.utilities\._pytree")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises as anywhere else; Lightning would end the process, and leave it deaf to another one."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop
