"""How many ranks each kind of parallelism gets, and the device meshes that follow."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Literal, NamedTuple

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modalities_core.errors import ConfigError

PIPELINE = "pp"
REPLICATE = "dp_replicate"
SHARD = "dp_shard"
CONTEXT = "cp"
TENSOR = "tp"
EXPERTS = "ep"

Degree = int | Literal["auto"]


class Degrees(NamedTuple):
    """Ranks along each axis of the mesh, outermost first; the product of all but ``ep`` is the number of ranks.

    pp: stages of ranks that the blocks are shared out to.
    dp_replicate: groups that each hold the whole model.
    dp_shard: ranks that share one copy of the model and see different data.
    cp: ranks that share the tokens of each sample, and the weights as ``dp_shard`` does.
    tp: ranks that share each matrix product, and the tokens between them.
    ep: ranks that share the experts of a mixture; they are taken from those of ``dp_shard`` and ``cp``.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __str__(self) -> str:
        """The arithmetic: the axes that matter, their product left out."""
        shown = {name: degree for name, degree in zip(self._fields, self, strict=True) if name != EXPERTS}
        return " x ".join(
            f"{name} {degree}" for name, degree in shown.items() if degree > 1 or name in (REPLICATE, SHARD)
        )

    @property
    def ranks(self) -> int:
        """Of the whole run."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def shards(self) -> int:
        """Ranks that each weight, or its tensor-parallel part, is sharded over."""
        return self.dp_shard * self.cp


def degrees(
    ranks: int,
    dp_replicate: Degree = 1,
    dp_shard: Degree = "auto",
    cp: Degree = 1,
    tp: Degree = 1,
    pp: Degree = 1,
    ep: int = 1,
    *,
    component: object = None,
) -> Degrees:
    """Resolve ``auto`` and make sure that the degrees multiply to the number of ranks.

    Args:
        ranks: processes of the run.
        dp_replicate: groups that each hold the whole model.
        dp_shard: ranks that share one copy of the model.
        cp: ranks that share the tokens of each sample.
        tp: ranks that share each matrix product.
        pp: stages of a pipeline.
        ep: ranks that share the experts; divides dp_shard x cp.
        component: the component whose arguments these are, for error positions.

    Of all but ``ep`` one may be ``auto``: all ranks that are left.

    Raises:
        ConfigError: the arithmetic does not work out.
    """
    given = {PIPELINE: pp, REPLICATE: dp_replicate, SHARD: dp_shard, CONTEXT: cp, TENSOR: tp}
    for name, degree in {**given, EXPERTS: ep}.items():
        if degree != "auto" and degree < 1:
            hint = '"auto" takes all ranks that are left' if name == SHARD else ""
            raise ConfigError(f"{name} is {degree}, but a degree is at least 1", hint=hint, about=(component, name))
    open_axes = [name for name, degree in given.items() if degree == "auto"]
    if len(open_axes) > 1:
        raise ConfigError(
            f"{' and '.join(open_axes)} are auto, but only one degree can be what is left of the others",
            hint=f"give {' or '.join(open_axes)} as a number",
            about=(component, open_axes[1]),
        )
    fixed = {name: degree for name, degree in given.items() if degree != "auto"}
    found = {**fixed, open_axes[0]: _left(ranks, fixed, component)} if open_axes else fixed
    resolved = Degrees(**{name: found[name] for name in given}, ep=ep)
    if resolved.ranks != ranks:
        raise _mismatch(ranks, resolved, component)
    if resolved.shards % ep:
        raise ConfigError(
            f"ep is {ep}, but experts are shared out among the dp_shard {resolved.dp_shard} x cp {resolved.cp} = "
            f"{resolved.shards} ranks that share the weights",
            hint=f"ep must divide {resolved.shards}: {_divisors(resolved.shards)}",
            about=(component, EXPERTS),
        )
    return resolved


def fewest_ranks(dp_replicate: Degree, dp_shard: Degree, cp: Degree, tp: Degree, pp: Degree, ep: int) -> int:
    """The smallest number of ranks that ``degrees`` takes with these arguments, where any does."""
    ranks = math.prod(degree for degree in (dp_replicate, dp_shard, cp, tp, pp) if degree != "auto")
    # Experts need as many ranks that share the weights.
    return ranks * (ep // math.gcd(ep, 1 if cp == "auto" else cp)) if dp_shard == "auto" and ep > 0 else ranks


class Meshes(NamedTuple):
    """The same ranks, arranged in different ways. Axes of one rank are left out, but never the data-parallel ones.

    degrees: along each axis.
    whole: pp, dp_replicate, dp_shard, cp, tp.
    weights: pp, dp_replicate, dp_shard, tp, with the ranks of cp in dp_shard: how weights are sharded.
    experts: pp, dp_replicate, dp_shard, ep, tp, with the ranks of ep taken out of dp_shard: how experts are; None
        without expert parallelism.
    """

    degrees: Degrees
    whole: DeviceMesh
    weights: DeviceMesh
    experts: DeviceMesh | None

    @property
    def data_rank(self) -> int:
        """This rank's place among those that see different data, which are numbered along both of their axes."""
        return place_along(self.whole, REPLICATE) * self.degrees.dp_shard + place_along(self.whole, SHARD)

    @property
    def sequence_rank(self) -> int:
        """This rank's place among those that share the tokens of each sample."""
        return place_along(self.whole, CONTEXT)


def device_meshes(device_type: str, degrees: Degrees, timeout: timedelta | None = None) -> Meshes:
    """The meshes of all ranks; collective.

    Neighbouring ranks are closest in the innermost axis, so that tensor parallelism stays inside a node, and after it
    the gathering of parameters.

    Args:
        device_type: cpu or cuda.
        degrees: ranks along each axis.
        timeout: how long ranks wait for each other in a collective; torch's own default without.
    """
    d = degrees
    whole = _mesh(
        device_type, {PIPELINE: d.pp, REPLICATE: d.dp_replicate, SHARD: d.dp_shard, CONTEXT: d.cp, TENSOR: d.tp}
    )
    outer = {PIPELINE: d.pp, REPLICATE: d.dp_replicate}
    weights = whole if d.cp == 1 else _mesh(device_type, {**outer, SHARD: d.shards, TENSOR: d.tp})
    experts = None
    if d.ep > 1:
        experts = _mesh(device_type, {**outer, SHARD: d.shards // d.ep, EXPERTS: d.ep, TENSOR: d.tp})
    if timeout is not None:
        for mesh in (whole, weights) if experts is None else (whole, weights, experts):
            for name in mesh.mesh_dim_names or ():
                mesh.get_group(name).set_timeout(timeout)
    return Meshes(d, whole, weights, experts)


def sharding_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What FSDP2 shards over: one axis, or two where copies of the model are replicated (HSDP).

    Args:
        mesh: ``weights`` or ``experts`` of ``Meshes``.
    """
    return mesh[REPLICATE, SHARD] if mesh[REPLICATE].size() > 1 else mesh[SHARD]


def place_along(mesh: DeviceMesh, axis: str) -> int:
    """This rank's place along ``axis``; 0 where the mesh has no such axis, as it is of one rank."""
    return mesh.get_local_rank(axis) if axis in (mesh.mesh_dim_names or ()) else 0


def _mesh(device_type: str, sizes: dict[str, int]) -> DeviceMesh:
    kept = {name: size for name, size in sizes.items() if size > 1 or name in (REPLICATE, SHARD)}
    return init_device_mesh(device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def _left(ranks: int, fixed: dict[str, int], component: object) -> int:
    """Ranks for the one axis that is auto."""
    taken = math.prod(fixed.values())
    if ranks % taken == 0:
        return ranks // taken
    larger = {name: degree for name, degree in fixed.items() if degree > 1}
    if len(larger) == 1:
        name, degree = next(iter(larger.items()))
        raise ConfigError(
            f"{ranks} ranks cannot be split into {name} = {degree} equal groups",
            hint=f"{name} must divide {ranks}: {_divisors(ranks)}",
            about=(component, name),
        )
    raise ConfigError(
        f"{' x '.join(f'{name} {degree}' for name, degree in larger.items())} = {taken} does not divide "
        f"the {_ranks(ranks)} of this run",
        hint=f"their product must divide {ranks}: {_divisors(ranks)}",
        about=(component, next(iter(larger))),
    )


def _mismatch(ranks: int, found: Degrees, component: object) -> ConfigError:
    product = found.ranks
    return ConfigError(
        f"{found} = {product}, but this run has {_ranks(ranks)}",
        hint=f'set dp_shard to "auto", or start {_ranks(product)} (torchrun --nproc-per-node {product} on one node)',
        about=(component, SHARD),
    )


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
