"""Operations that torch computes in one kernel, or by writing to views, written out: recurrence, circular padding."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bcoskit.dynamic._mode import ExplanationMode, NotLinearError
from bcoskit.dynamic.rules._table import enter, functions, rule

_State: TypeAlias = tuple[Tensor, ...]
# From what input and hidden state contribute before the gates, and the state, to the next state.
_Cell: TypeAlias = Callable[[Tensor, Tensor, _State], _State]


def _pad(mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(("input", "pad", "mode"), args, strict=False)) | kwargs
    if named.get("mode") != "circular":
        return mode.natural(func, args, kwargs)
    with mode:
        return _circular(named["input"], named["pad"])


enter(functions("pad"), _pad)


def _circular(x: Tensor, pad: Sequence[int]) -> Tensor:
    for index, (left, right) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis, size = -1 - index, x.shape[-1 - index]
        kept = x.narrow(axis, max(-left, 0), size - max(-left, 0) - max(-right, 0))
        size = kept.shape[axis]
        if max(left, right) > size:
            raise ValueError(f"`pad` (={tuple(pad)}) is wider than axis {axis} of `x`, which has {size} entries")
        before, after = kept.narrow(axis, size - max(left, 0), max(left, 0)), kept.narrow(axis, 0, max(right, 0))
        x = torch.cat((before, kept, after), axis)
    return x


def _lstm_cell(entry: Tensor, recurrent: Tensor, state: _State) -> _State:
    opening, keeping, new, output = (entry + recurrent).chunk(4, -1)
    cell = torch.sigmoid(keeping) * state[1] + torch.sigmoid(opening) * torch.tanh(new)
    return torch.sigmoid(output) * torch.tanh(cell), cell


def _gru_cell(entry: Tensor, recurrent: Tensor, state: _State) -> _State:
    (reset, update, new), (reset_h, update_h, new_h) = entry.chunk(3, -1), recurrent.chunk(3, -1)
    candidate = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
    kept = torch.sigmoid(update + update_h)
    return ((1 - kept) * candidate + kept * state[0],)


def _tanh_cell(entry: Tensor, recurrent: Tensor, state: _State) -> _State:
    return (torch.tanh(entry + recurrent),)


def _relu_cell(entry: Tensor, recurrent: Tensor, state: _State) -> _State:
    return (torch.relu(entry + recurrent),)


_CELLS: dict[str, _Cell] = {"lstm": _lstm_cell, "gru": _gru_cell, "rnn_tanh": _tanh_cell, "rnn_relu": _relu_cell}


def _direction(x: Tensor, state: _State, weights: Sequence[Tensor], cell: _Cell, has_biases: bool) -> Any:
    """One layer in one direction: (time, N, features) to the outputs and the last state."""
    in_weight, weight = weights[:2]
    in_bias, bias = weights[2:4] if has_biases else (None, None)
    projection = weights[-1] if len(weights) == (5 if has_biases else 3) else None
    outputs: list[Tensor] = []
    for entry in F.linear(x, in_weight, in_bias).unbind(0):
        state = cell(entry, F.linear(state[0], weight, bias), state)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs), state


def _network(name: str) -> Callable[..., Any]:
    cell = _CELLS[name]

    def run(
        x: Tensor,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> tuple[Tensor, ...]:
        if not isinstance(has_biases, bool):  # the arguments for a packed sequence
            raise NotLinearError(f"`{name}` of a packed sequence is not supported: give the padded one")
        if train and dropout > 0:
            raise NotLinearError(f"`dropout` (={dropout}) of `{name}` is random; call `model.eval()` first")
        states = tuple(hx) if name == "lstm" else (hx,)
        directions = 2 if bidirectional else 1
        per_direction = len(params) // (num_layers * directions)
        y = x.transpose(0, 1) if batch_first else x
        ends: list[_State] = []
        for layer in range(num_layers):
            outputs: list[Tensor] = []
            for backwards in range(directions):
                index = layer * directions + backwards
                weights = params[index * per_direction : (index + 1) * per_direction]
                start = tuple(state[index] for state in states)
                output, end = _direction(y.flip(0) if backwards else y, start, weights, cell, has_biases)
                outputs.append(output.flip(0) if backwards else output)
                ends.append(end)
            y = torch.cat(outputs, -1)
        y = y.transpose(0, 1) if batch_first else y
        return y, *(torch.stack(state) for state in zip(*ends, strict=True))

    return run


def _single(name: str) -> Callable[..., Any]:
    cell = _CELLS[name]

    def step(
        x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        state = tuple(hx) if name == "lstm" else (hx,)
        state = cell(F.linear(x, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return state if name == "lstm" else state[0]

    return step


def _register() -> None:
    for name in _CELLS:
        rule(getattr(torch, name))(_network(name))
        rule(getattr(torch, f"{name}_cell"))(_single(name))


_register()
