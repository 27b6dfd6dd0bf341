"""What a causal language model of transformers tells about its parts, so that parallelism can be applied from outside.

Tensor parallelism follows the class's own ``base_model_tp_plan``, where that splits whole layers and nothing else.
Context parallelism cannot be had: these classes take the number of tokens that attention sees from its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from modalities_core.interfaces import ParallelPlan

COLUMN, ROW = "colwise", "rowwise"
WHOLE = "replicated_with_grad_allreduce"
"""Of norms of single heads, which every rank has whole."""


def wrapped_plan(network: nn.Module, base: str, prefix: str) -> ParallelPlan:
    """The modules that the class says must not be split are blocks; where it names none, its layers.

    Args:
        network: the causal language model.
        base: the name of its part that gives hidden states.
        prefix: of the names in the plan.
    """
    blocks = tuple(dict.fromkeys(prefix + _general(name) for name in _blocks(network)))
    styles: Mapping[str, str] = getattr(cast(Any, network).config, "base_model_tp_plan", None) or {}
    layers = {f"{base}.{name}": style for name, style in styles.items()}
    table = cast(Any, network).get_input_embeddings()
    tables = [name for name, module in network.named_modules() if module is table]
    if not set(layers.values()) <= {COLUMN, ROW, WHOLE} or not isinstance(table, nn.Embedding):
        return ParallelPlan(blocks, embeddings=_tables_outside(network, prefix))
    names = {glob: [name for name, _ in network.named_modules() if _fits(name, glob)] for glob in layers}
    split = {glob: names[glob] for glob, style in layers.items() if style != WHOLE and names[glob]}
    matched = [name for found in split.values() for name in found]
    known = all(isinstance(network.get_submodule(name), nn.Linear) for name in matched)
    if not known or not _covers(network, matched, _blocks(network)):
        return ParallelPlan(blocks, embeddings=_tables_outside(network, prefix))
    column, row = (tuple(prefix + glob for glob in split if layers[glob] == style) for style in (COLUMN, ROW))
    return ParallelPlan(blocks, column=column, row=row, embeddings=tuple(prefix + name for name in tables))


def _tables_outside(network: nn.Module, prefix: str) -> tuple[str, ...]:
    """All tables outside of blocks, such as those of positions, for a pipeline, which does not split them."""
    inside = tuple(f"{block}." for block in _blocks(network))
    tables = (name for name, part in network.named_modules() if isinstance(part, nn.Embedding))
    return tuple(prefix + name for name in tables if not name.startswith(inside))


def _covers(network: nn.Module, split: Iterable[str], blocks: Iterable[str]) -> bool:
    """Whether every matrix of the blocks is split: one that a plan forgets may mix what ranks hold parts of."""
    inside = tuple(f"{block}." for block in blocks)
    matrices = {name for name, value in network.named_parameters() if value.dim() > 1 and name.startswith(inside)}
    return matrices == {f"{name}.weight" for name in split}


def _blocks(network: nn.Module) -> list[str]:
    wanted = set(getattr(network, "_no_split_modules", None) or ())
    found: list[str] = []
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if type(module).__name__ in wanted and not inside:
            found.append(name)
    return found or _layers(network)


def _layers(network: nn.Module) -> list[str]:
    """The modules of the list that holds most parameters."""
    lists = {name: part for name, part in network.named_modules() if isinstance(part, nn.ModuleList)}
    if not lists:
        return []
    name = max(lists, key=lambda name: sum(value.numel() for value in lists[name].parameters()))
    return [f"{name}.{place}" for place in range(len(lists[name]))]


def _general(name: str) -> str:
    """A module's name with every number replaced by a glob."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _fits(name: str, glob: str) -> bool:
    parts, patterns = name.split("."), glob.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
