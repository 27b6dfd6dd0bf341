"""What our optimizers share: they update each rank's shards where they lie, and never wait for the device.

Values may be stored in fewer bits than they are computed in. They are then taken out, updated and put back piece by
piece, so that little more than the stored memory is needed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from modalities_core.training.optim import rounding, storage
from modalities_core.training.optim.decision import Decision
from modalities_core.training.optim.placement import Elements, elements, local

StateDtype = Literal["fp32", "bf16", "int8"]
Rounding = Literal["nearest", "stochastic"]
PIECE_ELEMENTS = {"cpu": 1 << 17}
"""Elements that are taken out of their storage at a time: what a CPU's cache holds, elsewhere 2^25."""


@dataclass(slots=True)
class Piece:
    """Some rows of one rank's shard of a parameter, and of what is remembered of it; views of what is stored."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    step: Tensor
    key: Tensor | None
    place: Elements


@dataclass(slots=True)
class Work:
    """What an update reads and changes in place: parallel lists in float32, or float64 where a parameter is."""

    parameters: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)


class ShardOptimizer(torch.optim.Optimizer):
    """Base of optimizers whose update of an element needs nothing but the element.

    Follows torch's convention of fused optimizers: where the attributes ``grad_scale`` and ``found_inf`` are set,
    gradients are divided by the first, and where the second is 1 nothing changes, without the host knowing.

    Args:
        groups: as :func:`modalities_core.training.optim.groups.arrange` gives them.
        defaults: settings that every group has.
        state_dtype: how the running means are stored.
        rounding: of what is stored in bfloat16, parameters or states.
    """

    _step_supports_amp_scaling = True
    state_names: tuple[str, ...] = ()
    """What is remembered of each element; those in ``unsigned`` are never negative."""
    unsigned: frozenset[str] = frozenset()
    # torch wraps this so that a compiler in use leaves it alone; building an optimizer should not load the compiler.
    add_param_group = getattr(
        torch.optim.Optimizer.add_param_group, "__wrapped__", torch.optim.Optimizer.add_param_group
    )

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        state_dtype: StateDtype = "fp32",
        rounding: Rounding = "stochastic",
    ) -> None:
        super().__init__(groups, defaults)
        self.state_dtype: StateDtype = state_dtype
        self.rounding: Rounding = rounding
        self._salts: dict[tuple[Tensor, ...], Tensor] = {}

    @abstractmethod
    def update(self, group: dict[str, Any], work: Work, decision: Decision) -> None:
        """Change parameters and states in place; gradients may be overwritten. The steps have counted this one."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients anew, as in torch; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decision = Decision(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self.step_group(group, parameters, decision.on(parameters[0].device))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, stored as it was saved: torch alone would turn it into the parameters' dtype."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                    self.state[parameter][name] = value.detach().to(parameter.device, copy=True)

    def step_group(self, group: dict[str, Any], parameters: list[Tensor], decision: Decision) -> None:
        """Update the parameters of one group."""
        pieces = [piece for whole in self.whole(group, parameters, decision) for piece in _cut(whole)]
        for some in _batches(pieces):
            work = self._taken(some)
            self.update(group, work, decision)
            self._put_back(some, work)

    def whole(self, group: dict[str, Any], parameters: list[Tensor], decision: Decision) -> Iterator[Piece]:
        """Each parameter's shard as one piece, its step counted; made ready at its first update."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = self._new_state(parameter)
        steps = [self.state[parameter]["step"] for parameter in parameters]
        decision.count(steps)
        keys: Sequence[Tensor | None] = [None] * len(parameters)
        if self.rounding == "stochastic" and self._stores_bf16(parameters):
            keys = rounding.keys(steps, self._salts_of(parameters))
        for parameter, step, key in zip(parameters, steps, keys, strict=True):
            state = {name: local(value) for name, value in self.state[parameter].items() if name != "step"}
            assert parameter.grad is not None
            yield Piece(local(parameter), local(parameter.grad), state, step, key, elements(parameter))

    def names_of(self, parameter: Tensor) -> tuple[str, ...]:
        """What is remembered of each element of this parameter."""
        return self.state_names

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        for name in self.names_of(parameter):
            state |= storage.zeros(parameter, name, self.state_dtype)
        return state

    def _stores_bf16(self, parameters: Sequence[Tensor]) -> bool:
        return self.state_dtype == "bf16" or any(value.dtype == torch.bfloat16 for value in parameters)

    def _salts_of(self, parameters: list[Tensor]) -> Tensor:
        """Of these parameters, on their device; kept, since copying them there each step could wait for it."""
        group = tuple(parameters)
        if group not in self._salts:
            names = {
                parameter: name
                for settings in self.param_groups
                for parameter, name in zip(settings["params"], settings.get("param_names", ()), strict=False)
            }
            salts = [rounding.salt(names.get(parameter, str(at))) for at, parameter in enumerate(parameters)]
            self._salts[group] = torch.tensor(salts, dtype=torch.int64, device=parameters[0].device)
        return self._salts[group]

    def _taken(self, pieces: Sequence[Piece]) -> Work:
        work = Work(steps=[piece.step for piece in pieces])
        names = [name for name in pieces[0].state if not name.endswith(storage.SCALE)]
        work.states = {name: [] for name in names}
        for piece in pieces:
            dtype = storage.computing(piece.parameter.dtype)
            work.parameters.append(piece.parameter.to(dtype))
            work.gradients.append(piece.gradient.to(dtype))
            for name in names:
                work.states[name].append(storage.read(piece.state, name, dtype, name not in self.unsigned))
        return work

    def _put_back(self, pieces: Sequence[Piece], work: Work) -> None:
        for at, piece in enumerate(pieces):
            store(piece.parameter, work.parameters[at], piece, 0)
            for stream, (name, values) in enumerate(work.states.items(), start=1):
                if piece.state[name].dtype == torch.uint8:
                    storage.write_quantized(piece.state, name, values[at], name not in self.unsigned)
                else:
                    store(piece.state[name], values[at], piece, stream)


def store(stored: Tensor, value: Tensor, piece: Piece, stream: int) -> None:
    """Put a computed value where it is stored, rounded stochastically where the piece has a key."""
    if stored is value:
        return
    if stored.dtype == torch.bfloat16 and piece.key is not None:
        first, width, step, _ = piece.place
        value = rounding.round_stochastically(value.contiguous(), piece.key, first, stream, width, step)
    stored.copy_(value)


def _cut(piece: Piece) -> Iterator[Piece]:
    """Rows of a piece that fit into a batch; the piece itself where nothing has to be converted."""
    parameter = piece.parameter
    if parameter.numel() == 0:
        return
    limit = _limit(parameter.device)
    if parameter.ndim == 0 or parameter.numel() <= limit or _as_computed(piece):
        yield piece
        return
    per_row = parameter[0].numel()
    rows = max(1, limit // per_row)
    for start in range(0, len(parameter), rows):
        part = slice(start, start + rows)
        state = {name: value[part] for name, value in piece.state.items()}
        yield Piece(parameter[part], piece.gradient[part], state, piece.step, piece.key, piece.place.from_row(start))


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are updated together: of one device, dtype and kind of storage, not too many at a time."""
    alike: dict[tuple[object, ...], list[Piece]] = {}
    for piece in pieces:
        alike.setdefault((piece.parameter.device, piece.parameter.dtype, _as_computed(piece)), []).append(piece)
    for (_, _, unconverted), members in alike.items():
        batch: list[Piece] = []
        elements = 0
        for piece in members:
            if batch and not unconverted and elements + piece.parameter.numel() > _limit(piece.parameter.device):
                yield batch
                batch, elements = [], 0
            batch.append(piece)
            elements += piece.parameter.numel()
        yield batch


def _as_computed(piece: Piece) -> bool:
    """Whether it is stored as it is computed."""
    dtype = storage.computing(piece.parameter.dtype)
    return all(value.dtype == dtype for value in (piece.parameter, piece.gradient, *piece.state.values()))


def _limit(device: torch.device) -> int:
    return PIECE_ELEMENTS.get(device.type, 1 << 25)
