"""Blocks of a model compiled one by one, only while an executor runs them; and when that is worth its time."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from modalities_core.errors import ConfigError, first_line
from modalities_core.interfaces import Model
from modalities_core.training.plan import matching

GRAPHS_PER_BLOCK = 64


class CompiledBlocks:
    """The blocks of a model's parallel plan, each with a compiled ``forward``.

    It stands in the blocks inside of ``standing`` and nowhere else: generation, whose shapes change with every token,
    export and checkpoints meet the model as it was built. Blocks that are alike share one graph. What is compiled is
    ``forward`` without the hooks around it, so that those of sharding stay outside.

    Args:
        model: whose blocks.

    Raises:
        ConfigError: its plan names no blocks.
    """

    def __init__(self, model: Model) -> None:
        # In a pipeline, those without parameters are on other ranks.
        self._blocks = [block for block in blocks_of(model) if next(block.parameters(), None) is not None]
        self._forwards: list[Callable[..., Any]] = []

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Calls of the blocks run compiled code inside."""
        if not self._forwards:
            self._compile()
        own = [block.__dict__.get("forward") for block in self._blocks]
        try:
            for block, forward in zip(self._blocks, self._forwards, strict=True):
                block.__dict__["forward"] = forward
            yield
        finally:
            for block, forward in zip(self._blocks, own, strict=True):
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.__dict__["forward"] = forward

    def _compile(self) -> None:
        import torch._dynamo  # slow to import, so only where something is compiled

        # Training, evaluation and every kind of block count against one limit, which ends a run when it is passed.
        config = cast(Any, torch._dynamo.config)
        config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_BLOCK)
        # A graph per shape: there are few, and code for any shape is slower.
        self._forwards = [torch.compile(block.forward, fullgraph=True, dynamic=False) for block in self._blocks]


def blocks_of(model: Model) -> list[nn.Module]:
    """The modules that the model's plan names as blocks, without those that lie inside another.

    Raises:
        ConfigError: there are none.
    """
    module = cast(nn.Module, model)
    found = matching(module, model.parallel_plan().blocks, component=model)
    if not found:
        raise ConfigError(
            f"{type(model).__name__} names no blocks in its parallel plan, so there is nothing to compile",
            hint="set compile to none, or let the model's parallel_plan name its blocks",
            about=model,
        )
    return [part for name, part in found.items() if not any(name.startswith(f"{other}.") for other in found)]


def check_compile(model: Model, device: torch.device, about: object) -> None:
    """Refuse to compile what cannot be.

    Args:
        model: whose blocks.
        device: that the code is for; on the meta device, where a run is only checked, only the plan counts.
        about: whose argument ``compile`` is, for error positions.

    Raises:
        ConfigError: the plan names no blocks, a part of one says by ``cannot_compile`` why it cannot be, or there is no
            compiler.
    """
    for part in (part for block in blocks_of(model) for part in block.modules()):
        if reason := getattr(part, "cannot_compile", ""):
            raise ConfigError(
                f"blocks cannot be compiled: {reason}", hint="set compile to none", about=(about, "compile")
            )
    if device.type != "meta" and (obstacle := compile_obstacle(device)):
        message = f"blocks cannot be compiled: {obstacle}"
        raise ConfigError(message, hint="set compile to none, or install it", about=(about, "compile"))


def compile_obstacle(device: torch.device) -> str:
    """What keeps torch.compile from working here, in words; empty where nothing is known to.

    Args:
        device: that the compiled code is for.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.name == "nt":
        return "" if shutil.which("cl") else "there is no C++ compiler (cl) on this machine"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cuda":
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), "gcc")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}) on this machine"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python (Python.h, often in a package python3-dev) are not installed"
    return ""


def is_compile_error(error: BaseException) -> bool:
    """Whether ``error`` comes from compiling and not from what is compiled."""
    if "torch._dynamo" not in sys.modules:
        return False
    from torch._dynamo import exc

    return isinstance(error, (exc.TorchDynamoException, exc.FailOnRecompileLimitHit))


def no_graph(model: object, error: Exception, about: object) -> ConfigError:
    """What a user is told whose model's blocks failed to compile with ``error``."""
    return ConfigError(
        f"a block of {type(model).__name__} cannot be compiled: {first_line(error)}",
        hint="set compile to none",
        about=(about, "compile"),
    )


class Speed(NamedTuple):
    """What is assumed of a kind of device, so that every start of a run decides alike.

    flops_per_second: of training, on the high side, so that a run is rather thought too short than too long.
    saved: share of the time of a step that compiled blocks save.
    compile_seconds: until forward, backward and evaluation are compiled.
    """

    flops_per_second: float
    saved: float
    compile_seconds: float


def assumed_speed(device: torch.device, bf16: bool) -> Speed:
    """The figures for ``device``.

    CUDA: half of an H100's bfloat16 peak, and what torchtitan's Llama 3 8B on 8 H100 gained (5,762 to 6,667
    tokens/s). CPU: per thread what two cores with AVX512-BF16 reached, and what they gained (4,613 to 5,222).
    """
    if device.type == "cuda":
        return Speed(5e14, 0.13, 90.0)
    return Speed((3e11 if bf16 else 7e10) * torch.get_num_threads(), 0.11, 15.0)


def worth_compiling(device: torch.device, bf16: bool, flops: float) -> tuple[bool, str]:
    """Whether a run of ``flops`` on each device saves at least twice the time that compiling takes, and why.

    Args:
        device: of this rank.
        bf16: whether matrix products are in a 16-bit format.
        flops: training FLOPs of the whole run on one device.
    """
    speed = assumed_speed(device, bf16)
    seconds = flops / speed.flops_per_second
    saved = seconds * speed.saved
    reason = (
        f"compiling takes about {speed.compile_seconds:.0f} s and saves about {saved:.0f} s of at least {seconds:.0f}"
    )
    return saved >= 2 * speed.compile_seconds, reason
