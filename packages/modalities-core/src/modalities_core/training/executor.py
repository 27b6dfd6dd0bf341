"""Runs the model on micro batches in the order they come: no pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Loss, LossSum, Model, World
from modalities_core.training.parameters import as_module, on_meta


class Plain:
    """Forward and backward, one micro batch after the other, gradients of the summed loss accumulating.

    A model whose gradients are reduced by hooks (FSDP2) is told to reduce only with the last micro batch. A model
    that is not sharded is moved to ``world.device``; its parameters stay the same objects.

    Args:
        model: what is trained.
        loss: what is summed up.
        world: gives the device.
        precision: of the computation; weights, gradients and optimizer stay as they are. ``bf16`` runs under autocast;
            ``auto`` is ``bf16`` where the device computes it natively, else ``fp32``. The attribute ``precision``
            tells which one is in use.

    Raises:
        ConfigError: ``precision`` is none of these.
    """

    def __init__(
        self, model: Model, loss: Loss, world: World, precision: Literal["auto", "fp32", "bf16"] = "fp32"
    ) -> None:
        if precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"precision is auto, fp32 or bf16, not {precision!r}", about=(self, "precision"))
        self.model = model
        self.loss = loss
        self.world = world
        self.precision: Literal["fp32", "bf16"] = precision if precision != "auto" else _native(world.device)
        self._module = as_module(model)
        self._place()

    def forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        """Add the gradient of the summed loss over all micro batches to the parameters.

        Args:
            micro_batches: this rank's, on any device, at least one.

        Returns:
            This rank's sums, detached float32 scalars on the device; summed over all ranks they are the whole.
        """
        assert micro_batches, "a step has at least one micro batch"
        self._place()
        self._module.train()
        last = len(micro_batches) - 1
        sums: LossSum | None = None
        for place, batch in enumerate(micro_batches):
            synchronize = getattr(self._module, "set_requires_gradient_sync", None)
            if callable(synchronize):
                synchronize(place == last)
            part = self._forward(batch, self.loss)
            part.loss.backward()
            sums = _added(sums, part)
        assert sums is not None
        return self._share(sums)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossSum:
        """This rank's sums on one batch, without gradients, in evaluation mode; the mode is put back afterwards.

        Sums the loss's ``evaluation`` where it has one.
        """
        self._place()
        training = self._module.training
        self._module.eval()
        try:
            return self._share(self._forward(batch, getattr(self.loss, "evaluation", self.loss)))
        finally:
            self._module.train(training)

    def _forward(self, batch: Batch, loss: Loss) -> LossSum:
        batch = batch.to(self.world.device)
        with self._autocast():
            return loss(self._hidden(batch), self.model.head, batch)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        optional = {"segments_BT": batch.segments_BT, "images_BCHW": batch.images_BCHW}
        given = {name: value for name, value in optional.items() if value is not None}
        if not given:
            return self.model(batch.tokens_BT)
        taken = inspect.signature(self._module.forward).parameters
        for name in given:
            if name not in taken:
                raise self._refused(name)
        return self._module(batch.tokens_BT, **given)

    def _refused(self, name: str) -> ConfigError:
        kind = type(self._module).__name__
        if name == "images_BCHW":
            return ConfigError(
                f"the data has images, but {kind} does not look at them",
                hint="take a dataset of text, or give the model's forward the argument images_BCHW",
                about=self.model,
            )
        return ConfigError(
            f"the data marks where documents begin, but {kind} cannot keep them apart",
            hint="let the dataset join documents, or give the model's forward the argument segments_BT",
            about=self.model,
        )

    def _share(self, sums: LossSum) -> LossSum:
        # Ranks that see the same data (tensor parallel) would otherwise be counted several times.
        share = self.world.data_size / self.world.size
        return LossSum(sums.loss.detach().float() * share, sums.tokens.detach().float() * share)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _place(self) -> None:
        if on_meta(self.model):
            return  # only being checked, or about to be given values by whoever shards it
        if any(not hasattr(value, "to_local") and value.device != self.world.device for value in self._tensors()):
            before = list(self._module.parameters())
            self._module.to(self.world.device)
            assert all(a is b for a, b in zip(before, self._module.parameters(), strict=True))

    def _tensors(self) -> list[torch.Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]


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


def _native(device: torch.device) -> Literal["fp32", "bf16"]:
    return "bf16" if computes_bf16(device) else "fp32"


def _added(total: LossSum | None, part: LossSum) -> LossSum:
    if total is None:
        return LossSum(part.loss.detach(), part.tokens.detach())
    return LossSum(total.loss + part.loss.detach(), total.tokens + part.tokens.detach())
