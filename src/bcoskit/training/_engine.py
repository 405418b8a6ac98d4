"""Lightning, as this package uses it."""

import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, Sampler, default_convert

from bcoskit.data import InMemoryImages
from bcoskit.training._folder import CHECKPOINT
from bcoskit.training._module import Learner, seeded
from bcoskit.training._options import Optimization


class EpochShuffle(Sampler[int]):
    """A permutation of the indices that seed and epoch determine, so that a resumed run sees the same order.

    Args:
        length: Number of indices.
        seed: Of the permutations.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length, generator=seeded(self.seed, self.epoch)).tolist())


def fit(
    learner: Learner,
    train_images: InMemoryImages,
    test_images: InMemoryImages,
    *,
    batch_size: int,
    out: Path,
    epochs: int,
    resumed: bool,
    measure_every: int = 1,
    callbacks: Sequence[lightning.Callback] = (),
) -> dict[str, float]:
    """Train to the last epoch.

    Args:
        learner: What is trained.
        train_images: Of one epoch.
        test_images: What is measured on.
        batch_size: Images per step; the rest of an epoch that fills no batch is left out.
        out: Folder of the run.
        epochs: How many.
        resumed: Whether it goes on from the checkpoint in `out`.
        measure_every: Epochs from one measurement to the next; after the last one there always is one.
        callbacks: Of Lightning, beside its own.

    Returns:
        What was measured after the last epoch, by names that begin with `test_`.
    """
    order = EpochShuffle(len(train_images), learner.seed)
    train_batches = DataLoader(train_images, batch_size, sampler=order, drop_last=True, collate_fn=default_convert)
    test_batches = DataLoader(test_images, 4 * batch_size, collate_fn=default_convert)
    with torch.random.fork_rng(devices=()), _quiet(), _interruptible():
        trainer = _trainer(out, epochs, len(train_batches), measure_every, learner.optimization, callbacks)
        checkpoint = out / CHECKPOINT if resumed else None
        trainer.fit(learner, train_batches, test_batches, ckpt_path=checkpoint, weights_only=True)
        measured = trainer.callback_metrics
        # Of a run that had reached its last epoch before, or has not measured after it.
        if not measured or epochs % measure_every:
            measured = trainer.validate(learner, test_batches, verbose=False)[0]
    return {name: float(value) for name, value in measured.items() if name.startswith("test_")}


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
    steps: int,
    measure_every: int,
    optimization: Optimization,
    callbacks: Sequence[lightning.Callback],
) -> lightning.Trainer:
    averages: list[Any] = []
    if optimization.ema is not None:
        averages.append(EMAWeightAveraging(decay=optimization.ema, update_every_n_steps=optimization.ema_every))
    return lightning.Trainer(
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=optimization.accumulate,
        logger=[CSVLogger(out, "csv"), TensorBoardLogger(out, "tensorboard", "")],
        callbacks=[
            ModelCheckpoint((out / CHECKPOINT).parent, CHECKPOINT.stem, enable_version_counter=False),
            LearningRateMonitor("epoch"),
            *averages,
            *callbacks,
        ],
        inference_mode=False,  # in which nothing can be explained
        log_every_n_steps=min(50, steps),
        num_sanity_val_steps=0,
        check_val_every_n_epoch=measure_every,
        enable_model_summary=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice on other products, on workers, and on the folder of a run, which may have moved."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", "The dirpath has changed")
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
