"""In which format a model computes: working copies in 16 bits, autocast, or the weights themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from modalities_core.errors import ConfigError, first_line
from modalities_core.training.parameters import is_sharded

Precision = Literal["fp32", "bf16", "bf16_autocast", "bf16_weights", "fp16"]

_NAMES: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MIXED_DTYPES = re.compile(r"same dtype|scalar type|mixed dtype|expected dtype|dtype mismatch", re.IGNORECASE)


class Choice(NamedTuple):
    """How a model is going to compute.

    precision: the name of it.
    reason: why, in words.
    copies: whether bfloat16 copies of the weights have to be made.
    autocast: what ``torch.autocast`` is asked for around the forward; None for no autocast.
    """

    precision: Precision
    reason: str
    copies: bool = False
    autocast: torch.dtype | None = None


def choose(asked: str, module: nn.Module, device: torch.device, about: object) -> Choice:
    """What ``asked`` means for this model on this device.

    A wrapper that decides the precision itself, such as parallel.fsdp2, gives the model an attribute
    ``computing_dtype``; ``auto`` and ``fp32`` leave it alone.

    Args:
        asked: ``auto`` or a Precision.
        module: the model.
        device: where it computes.
        about: whose argument it is, for error positions.

    Raises:
        ConfigError: there is no such precision, or it contradicts the wrapper or the weights.
    """
    known = ("auto", *get_args(Precision))
    if asked not in known:
        message = f"precision is {', '.join(known[:-1])} or {known[-1]}, not {asked!r}"
        raise ConfigError(message, about=(about, "precision"))
    sharded = is_sharded(module)
    wrapped = _NAMES.get(cast(Any, getattr(module, "computing_dtype", None)))
    if asked in ("auto", "fp32") and (wrapped is not None or sharded):
        asked, reason = wrapped or "fp32", "as the model is wrapped"
    elif asked in ("bf16", "fp16") and (sharded or wrapped is not None) and wrapped != asked:
        raise ConfigError(
            f"precision is {asked}, but the model is wrapped to compute in {wrapped or 'a precision of its own'}",
            hint=f"set param_dtype to {asked} where the model is sharded, and leave precision out",
            about=(about, "precision"),
        )
    elif asked != "auto":
        reason = "as configured"
    elif any(value.is_floating_point() and value.dtype != torch.float32 for value in module.parameters()):
        asked, reason = "fp32", "the weights are not float32 and stay as they are"
    elif computes_bf16(device):
        asked, reason = "bf16", f"{device.type} has bfloat16 matrix products"
    else:
        asked, reason = "fp32", f"{device.type} has no bfloat16 matrix products"
    if asked == "bf16_autocast":
        return Choice(asked, reason, autocast=torch.bfloat16)
    if asked == "fp16" and not sharded:
        # Not copies: float16 overflows at 65,504, and autocast keeps norms and the residual stream in float32.
        return Choice(asked, reason, autocast=torch.float16)
    return Choice(cast(Precision, asked), reason, copies=asked == "bf16" and not sharded)


def mixes_dtypes(error: BaseException) -> bool:
    """Whether ``error`` is torch's about operands of two dtypes, as from a model that mixes weights with float32."""
    return isinstance(error, RuntimeError) and _MIXED_DTYPES.search(str(error)) is not None


def no_copies(model: object, error: Exception, about: object) -> ConfigError:
    """What a user is told whose model failed with ``error`` on bfloat16 weights."""
    return ConfigError(
        f"{type(model).__name__} does not work with bfloat16 weights: {first_line(error)}",
        hint="set precision to bf16_autocast",
        about=(about, "precision"),
    )


@torch.no_grad()
def round_weights(module: nn.Module) -> None:
    """Make all floating-point parameters bfloat16 in place; they stay the same objects, sharded ones too."""

    def rounded(value: Tensor) -> Tensor:
        return value.to(torch.bfloat16) if isinstance(value, nn.Parameter) and value.is_floating_point() else value

    # What ``Module.to`` does, but for parameters only: buffers, such as loads of experts, keep their precision.
    module._apply(rounded)


class WorkingCopies:
    """Copies of a model's weights in 16 bits that stand in its modules while it computes.

    The parameters proper, the masters, keep their dtype and are what optimizer, checkpoints and export see. Gradients
    are taken for the copies and arrive in the masters' ``grad`` in the masters' dtype, where they add up over micro
    batches without losing bits. (Mixed precision with master weights: arXiv:1710.03740, section 3.1. FSDP2's
    ``MixedPrecisionPolicy(param_dtype=...)`` computes the same on shards.)

    Buffers are left alone; a parameter under several names stays one.

    Args:
        module: on its device, with values.
        dtype: of the copies.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._places: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter, nn.Parameter]] = []
        for owner in module.modules():
            for name, master in owner._parameters.items():
                if master is None or not master.is_floating_point() or master.dtype.itemsize <= dtype.itemsize:
                    continue
                if master not in self._copies:
                    copy = nn.Parameter(torch.empty_like(master, dtype=dtype), requires_grad=master.requires_grad)
                    copy.grad_dtype = master.dtype
                    self._copies[master] = copy
                self._places.append((owner._parameters, name, master, self._copies[master]))
        self._versions = -1

    def refresh(self) -> None:
        """Round the masters into the copies, if they may have changed since the last time."""
        for master, copy in self._copies.items():
            copy.requires_grad = master.requires_grad
        versions = sum(master._version for master in self._copies)
        if versions != self._versions:
            with torch.no_grad():
                torch._foreach_copy_(list(self._copies.values()), list(self._copies))
            self._versions = versions

    def changed(self) -> None:
        """Have the next ``refresh`` round again, also where masters were changed behind autograd's back."""
        self._versions = -1

    @contextmanager
    def standing(self) -> Iterator[None]:
        """The copies stand in the modules inside."""
        try:
            for parameters, name, _, copy in self._places:
                parameters[name] = copy
            yield
        finally:
            for parameters, name, master, _ in self._places:
                parameters[name] = master

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, with gradients of the copies added to those of the masters."""
        # Only here: a compiled forward that meets a gradient of another dtype than its parameter's gives up.
        for master, copy in self._copies.items():
            copy.grad = master.grad
        try:
            loss.backward()
        finally:
            for master, copy in self._copies.items():
                if master.grad is None:
                    master.grad = copy.grad
                elif copy.grad is not None and copy.grad is not master.grad:
                    master.grad += copy.grad  # something reads the master itself as well
                copy.grad = None


def computes_bf16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for bfloat16 matrix products, so that bf16 is faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    for query in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if hasattr(torch.cpu, query) and getattr(torch.cpu, query)():
            return True
    # ARM has no query in torch; Linux lists it as a feature.
    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text(errors="replace").split() if cpuinfo.exists() else []
    return "avx512_bf16" in words or "bf16" in words
