"""Expert parallelism: each rank holds some experts of every mixture, and rows of tokens travel to them.

Experts are shared out along the axis ``ep`` of the mesh of experts: rank i of n has the i-th of n equal parts. What is
left over of the data-parallel ranks holds shards of the same experts. (GShard, arXiv:2006.16668.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import ParallelPlan
from modalities_core.training.plan import matching
from modalities_parallel.experts_dispatch import arrangement, exchange, permute
from modalities_parallel.mesh import EXPERTS, Degrees, Meshes
from modalities_parallel.tensor.parameters import along, distribute, read_parts


class SpreadExperts:
    """In front of the class of a module with experts: rows go to the ranks that hold their experts, and come back."""

    cannot_compile = "how many rows travel between the ranks that share the experts (ep) changes with every batch"

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the module gives."""
        output = super().forward(*arguments, **keywords)  # pyrefly: ignore[missing-attribute]
        # FSDP2 hangs a hook on what a unit gives, and warns of views, as one that is changed in place would lose it.
        return output.clone() if isinstance(output, Tensor) and output._is_view() else output

    def apply_experts(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Each row through its expert, wherever that is: (R, D) to (R, D); collective.

        Args:
            rows_RD: all rows of expert 0, then those of expert 1, and so on; of all experts of all ranks.
            ends_E: int32, where the rows of each of them end.
        """
        module: Any = self
        there = arrangement(ends_E, module.expert_ranks)
        arrived_SD = permute(exchange(rows_RD, there.sent, there.received, there.group), there.order_S, there.place_S)
        given_SD = super().apply_experts(arrived_SD, there.ends_e)  # pyrefly: ignore[missing-attribute]
        return exchange(permute(given_SD, there.place_S, there.order_S), there.received, there.sent, there.group)


def spread(model: nn.Module, plan: ParallelPlan, meshes: Meshes, *, component: object = None) -> list[nn.Module]:
    """Leave this rank's experts in the modules that ``plan`` names, in place; returns these modules.

    Args:
        model: on the meta device.
        plan: its own; ``experts`` names modules that satisfy ``modalities_core.interfaces.Experts``.
        meshes: the world's, one of them for experts.
        component: whose argument ``world`` errors are about.

    Raises:
        ConfigError: the model has no experts, or they cannot be shared out; the message says why.
    """
    modules = matching(model, plan.experts, component=component)
    refuse(model, plan, modules, meshes.degrees, component)
    assert meshes.experts is not None, "the degree of expert parallelism is larger than 1"
    mesh = meshes.experts[EXPERTS]
    for module in modules.values():
        readings = {name: along(0) for name in cast(Any, module).expert_parameters}
        for name in readings:
            module._parameters[name] = distribute(
                cast(nn.Parameter, module._parameters[name]), mesh, along(0).placement
            )
        read_parts(module, readings, mesh.get_local_rank(), SpreadExperts)
        cast(Any, module).expert_ranks = mesh.get_group()
    return list(modules.values())


def refuse(
    model: nn.Module, plan: ParallelPlan, modules: Mapping[str, nn.Module], degrees: Degrees, component: object = None
) -> None:
    """Raise ConfigError if the experts of ``model`` cannot be shared out over ``degrees.ep`` ranks.

    Args:
        model: with whole parameters.
        plan: its own.
        modules: with experts, by name; none where a pipeline took them to other ranks.
        degrees: of the mesh.
        component: whose argument ``world`` errors are about.
    """
    ep, about = degrees.ep, (component, "world")
    if not plan.experts:
        raise ConfigError(
            f"ep is {ep}, but the parallel plan of {type(model).__name__} has no experts",
            hint="set ep of world.auto to 1, or give the model a feedforward with experts",
            about=about,
        )
    if degrees.tp > 1:
        raise ConfigError(
            f"experts cannot be shared out (ep {ep}) and split (tp {degrees.tp})", hint="set tp or ep to 1", about=about
        )
    for name, module in modules.items():
        own = {key: value for key, value in module._parameters.items() if value is not None}
        experts: tuple[str, ...] = getattr(module, "expert_parameters", ())
        others = [key for key in own if key not in experts]
        if not experts or not hasattr(module, "apply_experts"):
            why = "it has no expert_parameters and apply_experts, see modalities_core.interfaces.Experts"
        elif others:
            why = f"its own parameter {others[0]} is not among its expert_parameters"
        else:
            why = ""
        if why:
            raise ConfigError(
                f"the experts of {name}, a {type(module).__name__}, cannot be shared out: {why}",
                hint="set ep of world.auto to 1",
                about=about,
            )
        for key in experts:
            if (count := own[key].shape[0]) % ep:
                raise ConfigError(
                    f"the {count} experts of {name} cannot be shared out among ep {ep} ranks",
                    hint=f"ep must divide {count}: {', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}",
                    about=about,
                )
