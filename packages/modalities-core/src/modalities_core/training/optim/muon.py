"""Muon: orthogonalised momentum for matrices, AdamW for all else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Model
from modalities_core.training.optim.adam import MOMENTS, update_adam
from modalities_core.training.optim.decision import Decision
from modalities_core.training.optim.groups import (
    NO_DECAY,
    ParameterGroup,
    arrange,
    check_ranges,
    matches,
    refuse_unmatched,
)
from modalities_core.training.optim.orthogonal import orthogonalize_shards
from modalities_core.training.optim.shards import Piece, Rounding, ShardOptimizer, Work, store

BY_ADAMW = ("*embed*", "*wte*", "*wpe*", "*positions*", "head.*", "*.head.*", "*lm_head*", "*router*")
"""Names of embeddings, output heads and routers: matrices whose rows are looked up or chosen between."""

UpdateScale = Literal["match_rms_adamw", "original"]


def muon(
    model: Model,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    update_scale: UpdateScale = "match_rms_adamw",
    by_adamw: tuple[str, ...] = BY_ADAMW,
    adamw_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    no_decay: tuple[str, ...] = NO_DECAY,
    groups: Sequence[ParameterGroup] = (),
    state_dtype: Literal["fp32", "bf16"] = "fp32",
    rounding: Rounding = "stochastic",
) -> torch.optim.Optimizer:
    """Muon (Keller Jordan et al., kellerjordan.github.io/posts/muon) for matrices, AdamW for all other parameters.

    The momentum of each matrix is replaced by the nearest orthogonal matrix, roughly, by five Newton-Schulz steps in
    bfloat16. Where a matrix is sharded, one rank gathers the whole, so that the result does not depend on the number
    of ranks; the matrices are shared out between the ranks. Three-dimensional parameters are stacks of matrices.

    Args:
        model: whose parameters are trained.
        lr: peak learning rate of the matrices; the schedule scales it.
        momentum: decay of the running mean of the gradient, in [0, 1).
        nesterov: look ahead by the momentum.
        weight_decay: share of the weights, times the learning rate, taken off in each step, in both parts.
        update_scale: factor on the orthogonal matrix; match_rms_adamw is 0.2 sqrt(max(rows, columns)), with which
            learning rates and weight decays of AdamW fit (Moonlight, arXiv:2502.16982); original is
            sqrt(max(1, rows / columns)), which wants a learning rate of about 0.02.
        by_adamw: globs of parameter names that AdamW updates, besides vectors; by default embeddings, heads, routers.
        adamw_lr: peak learning rate of the part that AdamW updates; lr where it is left out.
        betas: of AdamW: decay of the running mean of the gradient and of its square, each in [0, 1).
        eps: of AdamW: added to the denominator.
        no_decay: globs of parameter names without weight decay; by default norms, biases, embeddings, single factors.
        groups: parameters, by globs of their names, with settings of their own; the first that matches holds.
        state_dtype: how momentum and running means are stored.
        rounding: of what is stored in bfloat16, parameters, momentum or running means.

    Raises:
        ConfigError: a number is out of range, a glob given here matches no parameter, no matrix is left for Muon, or
            nothing is trainable.
    """
    adamw_lr = lr if adamw_lr is None else adamw_lr
    common = {"weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
    check_ranges(muon, {"lr": lr, "adamw_lr": adamw_lr, **common})
    settings = [{"lr": lr, "orthogonal": True, **common}, {"lr": adamw_lr, "orthogonal": False, **common}]

    def kind(name: str, parameter: Tensor) -> int:
        return int(parameter.ndim < 2 or matches(name, by_adamw))

    arranged = arrange(muon, model, groups, no_decay, settings, kind)
    if tuple(by_adamw) != BY_ADAMW:
        refuse_unmatched(muon, "by_adamw", by_adamw, [name for group in arranged for name, _ in group["params"]])
    if not any(group["orthogonal"] for group in arranged):
        raise ConfigError(
            "no matrix is left for Muon: AdamW would update all parameters",
            hint="take optimizer.adamw, or let by_adamw match less",
            about=(muon, "by_adamw"),
        )
    return Muon(arranged, nesterov, update_scale, state_dtype, rounding)


class Muon(ShardOptimizer):
    """Muon over shards; see :func:`muon`."""

    state_names = MOMENTS
    unsigned = frozenset({"exp_avg_sq"})

    def __init__(
        self,
        groups: list[dict[str, Any]],
        nesterov: bool,
        update_scale: UpdateScale,
        state_dtype: Literal["fp32", "bf16"],
        rounding: Rounding,
    ) -> None:
        self._matrices = {parameter for group in groups if group["orthogonal"] for _, parameter in group["params"]}
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "orthogonal": False}, state_dtype, rounding)
        self._nesterov = nesterov
        self._update_scale: UpdateScale = update_scale

    def names_of(self, parameter: Tensor) -> tuple[str, ...]:
        """A momentum for matrices, both running means for others."""
        return ("momentum_buffer",) if parameter in self._matrices else MOMENTS

    def update(self, group: dict[str, Any], work: Work, decision: Decision) -> None:
        """One step of AdamW, for what is not a matrix."""
        update_adam(group, work, decision, decoupled=True)

    def step_group(self, group: dict[str, Any], parameters: list[Tensor], decision: Decision) -> None:
        """Update the parameters of one group, matrices by Muon."""
        if not group["orthogonal"]:
            super().step_group(group, parameters, decision)
            return
        pieces = list(self.whole(group, parameters, decision))
        directions = [self._direction(group["momentum"], piece, decision) for piece in pieces]
        for parameter, piece, direction in zip(
            parameters, pieces, orthogonalize_shards(parameters, directions), strict=True
        ):
            change = group["lr"] * decision.keep
            weights = piece.parameter.to(torch.promote_types(piece.parameter.dtype, torch.float32))
            weights.mul_(1 - group["weight_decay"] * change)
            # Scaled in full precision: the factor is not one that bfloat16 has.
            weights.sub_(direction.to(weights.dtype).mul_(update_factor(parameter, self._update_scale) * change))
            store(piece.parameter, weights, piece, 0)

    def _direction(self, momentum: float, piece: Piece, decision: Decision) -> Tensor:
        """The momentum after this step, in bfloat16, the precision in which it is made orthogonal."""
        buffer = piece.state["momentum_buffer"]
        dtype = torch.promote_types(piece.parameter.dtype, torch.float32)
        gradient, mean = piece.gradient.to(dtype), buffer.to(dtype)
        decision.apply([gradient])
        mean.add_((gradient - mean).mul_((1 - momentum) * decision.keep))
        store(buffer, mean, piece, 1)
        return (gradient.lerp(mean, momentum) if self._nesterov else mean).to(torch.bfloat16)


def update_factor(parameter: Tensor, update_scale: UpdateScale) -> float:
    """What the orthogonal matrix is multiplied by besides the learning rate, from the shape of the whole parameter."""
    shape = parameter.shape
    rows, columns = (shape[0], math.prod(shape[1:])) if parameter.ndim > 3 else shape[-2:]
    if update_scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
