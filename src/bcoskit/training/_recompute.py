"""Stages that are computed once more in the backward pass, instead of being kept in memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from bcoskit.models import Network


class Recomputed(CheckpointWrapper):
    """A module whose activations are recomputed; keys of its weights are as before, and so is evaluation.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, context_fn=self._contexts)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """As of the module."""
        if self.training and torch.is_grad_enabled():
            return super().forward(*arguments, **keywords)
        return self._checkpoint_wrapped_module(*arguments, **keywords)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._without_traces()

    @contextmanager
    def _without_traces(self) -> Iterator[None]:
        """The second pass must not move running statistics once more."""
        before = [(buffer, buffer.clone()) for buffer in self.buffers()]
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)


def recompute_stages(network: Network) -> None:
    """Wrap the blocks of every stage, or stages that are no sequences of blocks themselves.

    Stages without weights keep little, and may be activations that write into what would have to be kept for them.
    """
    modules = dict(network.named_modules())
    for path in network.stage_names:
        stage = modules[path]
        if not any(True for _ in stage.parameters()):
            continue
        if isinstance(stage, nn.Sequential):
            for name, block in list(stage.named_children()):
                stage.set_submodule(name, Recomputed(block))
        else:
            network.set_submodule(path, Recomputed(stage))


def keep_stages(network: Network) -> None:
    """Undo `recompute_stages`."""
    for path, module in list(network.named_modules()):
        if isinstance(module, Recomputed):
            network.set_submodule(path, module._checkpoint_wrapped_module)
