"""One micro batch on the meta device: which memory forward and backward hold at once, and what they compute.

Nothing is computed and nothing allocated; every operation is seen with the shapes and dtypes of its tensors. Attention
and RMSNorm, which PyTorch takes apart on the meta device, count as the fused kernels that GPUs have for them.

Shape suffixes: B batch, T queries, S keys, H heads, F elements of one head.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modalities_core.interfaces import Batch, Loss, Model
from modalities_core.training.calling import call
from modalities_core.training.parameters import as_module
from modalities_core.training.precision import WorkingCopies

aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention: (2, 4),
    aten._scaled_dot_product_flash_attention_backward: (5, 11),
}
"""Flash attention (arXiv:2307.08691): products of queries and keys, five backward as the scores are computed again;
and which argument says that it is causal."""
GROUPED = {"modalities.grouped_linear": 1, "modalities.grouped_linear_backward": 2}
"""Products of rows with the matrix of their expert, where torch has no kernel; rows (N, I), matrices (E, O, I)."""
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._grouped_mm}


class Operation(NamedTuple):
    """What one kernel does: FLOPs of matrix products, and bytes that it reads and writes."""

    flops: float
    read: float
    written: float


class Trace(NamedTuple):
    """What one micro batch takes besides weights and their gradients, in bytes, and what is computed for it.

    activations: held from forward to backward, the hidden states that the loss gets among them.
    loss: more that the head and the loss hold at most, such as logits or a chunk of them, and gradients of them.
    backward: more than both that the backward pass holds at its highest point.
    operations: of forward, loss and backward.
    """

    activations: int
    loss: int
    backward: int
    operations: Sequence[Operation]

    @property
    def peak(self) -> int:
        """All of the memory."""
        return self.activations + self.loss + self.backward


def trace(model: Model, loss: Loss, batch: Batch, dtype: torch.dtype | None = None) -> Trace:
    """Run one micro batch through a model on the meta device.

    Gradients of parameters count while they are computed, not after: who keeps them decides how much that is.

    Args:
        model: on the meta device.
        loss: of the run.
        batch: tensors on the meta device.
        dtype: of the weights that the model computes with; None takes them as they are.
    """
    module = as_module(model)
    copies = None if dtype is None else WorkingCopies(module, dtype)
    recording = _Recording([*module.parameters(), *module.buffers()])
    module.train()
    with copies.standing() if copies is not None else nullcontext():
        used = [parameter for parameter in module.parameters() if parameter.requires_grad]
        recording.ignore(used)
        hooks = [parameter.register_post_accumulate_grad_hook(_forget) for parameter in used]
        try:
            with recording, _fused(recording):
                hidden = call(model, batch)
                activations = recording.highest = recording.bytes
                value = loss(hidden, model.head, batch).loss
                of_loss = recording.highest
                leaves = [leaf for leaf in tree_leaves(hidden) if isinstance(leaf, Tensor) and leaf.requires_grad]
                slopes = [_Slope(leaf, recording) for leaf in leaves]
                value.backward()
                of_loss = max(of_loss, *(slope.highest for slope in slopes))
        finally:
            for hook in hooks:
                hook.remove()
    return Trace(activations, of_loss - activations, recording.highest - of_loss, recording.operations)


class _Slope:
    """Notes the highest memory up to the moment at which the gradient of a tensor is known."""

    def __init__(self, tensor: Tensor, recording: _Recording) -> None:
        self.highest = 0
        self._recording = recording
        tensor.register_hook(self._arrived)

    def _arrived(self, gradient: Tensor) -> None:
        self.highest = self._recording.highest


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class _Recording(TorchDispatchMode):
    """Sees every operation: which storages live, and what is computed."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self.highest = 0
        self.operations: list[Operation] = []
        self._living: dict[int, weakref.ref[Any]] = {}
        self._ignored: list[Any] = []
        self.ignore(ignored)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Take the storages of these for known: weights."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._ignored.append(storage)
            self._living[id(storage)] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        for tensor in made:
            self._see(tensor)
        if not func.is_view:
            given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
            self._count(func.overloadpacket, args, given, made)
        return out

    def compute(self, flops: float, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Note one kernel."""
        self.operations.append(Operation(flops, sum(map(_bytes, given)), sum(map(_bytes, made))))

    def _count(self, packet: Any, arguments: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        if packet in PRODUCTS:
            # The last two that are given are the factors; (M, K) and (K, N) have M K N products, batches of them too.
            left, right = given[-2:]
            flops = 2.0 * math.prod(left.shape) * right.shape[-1]
            self.compute(flops, given, made)
        elif str(packet) in GROUPED:
            rows, matrices = given[-3:-1]
            products = GROUPED[str(packet)]
            self.compute(2.0 * products * rows.numel() * matrices.shape[1], given, made)
        elif packet in ATTENTION:
            # Query (B, H, T, F) and key (B, H, S, F); a causal one skips the half that nobody sees.
            products, causal = ATTENTION[packet]
            query, key = given[1:3] if products == 5 else given[:2]
            share = 0.5 if len(arguments) > causal and arguments[causal] else 1.0  # defaults are left out
            self.compute(2.0 * products * share * query.numel() * key.shape[-2], given, made)
        elif packet not in (aten.empty, aten.empty_like, aten.empty_strided, aten.detach, aten.alias):
            self.compute(0.0, given, made)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._living:
            return
        size = storage.nbytes()
        self.bytes += size
        self.highest = max(self.highest, self.bytes)

        def gone(_: Any) -> None:
            del self._living[key]
            self.bytes -= size

        self._living[key] = weakref.ref(storage, gone)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _fused(recording: _Recording) -> Iterator[None]:
    """Inside, what PyTorch takes apart on the meta device is replaced by stand-ins for the kernels of GPUs.

    In the functions' place, as a ``TorchFunctionMode`` is off within the backward pass, where blocks run again.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        # One operation, so that selective recomputation sees it too.
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal, scale=scale)[0]

    def norm(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Any:
        return _Norm.apply(input, weight, recording)

    before = F.scaled_dot_product_attention, F.rms_norm
    try:
        F.scaled_dot_product_attention, F.rms_norm = attention, norm
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = before


class _Norm(torch.autograd.Function):
    """RMSNorm as one kernel without values: keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, recording: _Recording) -> Tensor:
        """One pass."""
        normed, factors = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, factors)
        ctx.recording = recording
        recording.compute(0.0, (x,), (normed, factors))
        return normed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """One pass."""
        x, weight, factors = ctx.saved_tensors
        slope = torch.empty_like(x)
        ctx.recording.compute(0.0, (x, factors, *grad_outputs), (slope,))
        return slope, None if weight is None else torch.empty_like(weight), None
