"""Runs the model on micro batches in the order they come: no pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch

from modalities_core.errors import ConfigError, first_line
from modalities_core.interfaces import Batch, Loss, LossSum, Model, World
from modalities_core.training.calling import call
from modalities_core.training.compiling import (
    CompiledBlocks,
    check_compile,
    is_compile_error,
    no_graph,
    worth_compiling,
)
from modalities_core.training.parameters import as_module, is_sharded, on_meta
from modalities_core.training.precision import (
    Choice,
    WorkingCopies,
    choose,
    mixes_dtypes,
    no_copies,
    round_weights,
)
from modalities_core.training.scaler import GradientScaler
from modalities_core.training.throughput import Phases
from modalities_core.training.trial import Trial

log = logging.getLogger("modalities")


class Plain:
    """Forward and backward, one micro batch after the other, gradients of the summed loss accumulating.

    A model whose gradients are reduced by hooks (FSDP2) is told to reduce only with the last micro batch. A model
    that is not sharded is moved to ``world.device``; its parameters stay the same objects.

    What the trainer may use beside the Protocol: ``scaler``, whose ``scale`` the gradients are multiplied by, or None;
    ``phases``, the seconds of forward and backward; ``after_first``, called with this rank's sums once the gradients of
    the first of several micro batches are there and reduced; ``prepare``, ``state`` and ``restore``.

    Args:
        model: what is trained.
        loss: what is summed up.
        world: gives the device.
        precision: of the computation. ``bf16`` computes with bfloat16 copies of the weights, made anew in every step;
            ``bf16_autocast`` under torch.autocast, slower, for models that mix dtypes; both leave weights, gradients
            and optimizer in float32. ``bf16_weights`` makes weights and gradients themselves bfloat16, half the
            memory, and wants an optimizer that rounds stochastically. ``fp16`` is float16 autocast and a gradient
            scaler, for GPUs without bfloat16. ``auto`` is ``bf16`` where the device computes it natively, else
            ``fp32``. A model that parallel.fsdp2 wrapped computes in its ``param_dtype``; ``auto`` and ``fp32`` leave
            that alone.
            The attribute ``precision`` tells which one is in use, ``asked`` what was configured.
        compile: ``blocks`` compiles each block of the model's parallel plan with torch.compile; ``auto`` does so where
            the whole run is long enough to win back at least twice the time it takes; ``none`` never.

    Raises:
        ConfigError: ``precision`` or ``compile`` is none of these, contradicts how the model is wrapped, or cannot be
            had here.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        world: World,
        precision: Literal["auto", "fp32", "bf16", "bf16_autocast", "bf16_weights", "fp16"] = "fp32",
        compile: Literal["auto", "blocks", "none"] = "none",
    ) -> None:
        if compile not in ("auto", "blocks", "none"):
            raise ConfigError(f"compile is auto, blocks or none, not {compile!r}", about=(self, "compile"))
        if hasattr(model, "whole_model") or getattr(getattr(world, "degrees", None), "pp", 1) > 1:
            raise ConfigError(
                "executor.plain runs whole models, but pp of this world cuts the model into stages",
                hint="use executor.pipeline, or set pp of world.auto to 1",
                about=(self, "world"),
            )
        self.model = model
        self.loss = loss
        self.world = world
        self.compile = compile
        self.phases = Phases(world.device)
        self.after_first: Callable[[LossSum], None] | None = None
        self._module = as_module(model)
        self._sharded = is_sharded(self._module)
        self.asked = precision
        self._placed = False
        self._take(choose(precision, self._module, world.device, self))
        self.scaler = GradientScaler(world.device) if self.precision == "fp16" else None
        self._compiled: CompiledBlocks | None = None
        self._saved: dict[str, Any] = {}
        self._proven: set[str] = set()
        if compile == "blocks":
            check_compile(model, world.device, self)
            self._compiled = CompiledBlocks(model)
        self._place()

    def prepare(self, steps: int, tokens_per_step: int) -> None:
        """Settle what ``auto`` leaves open, alike whenever a run is started or continued, and log it in one line.

        Args:
            steps: of the whole run.
            tokens_per_step: over all ranks.
        """
        device = self.world.device
        said = [f"precision {self.precision} ({self._choice.reason})"] if self.asked == "auto" else []
        if self.compile == "auto":
            wanted, reason = self._auto_compile(steps, tokens_per_step)
            self._compiled = CompiledBlocks(self.model) if wanted else None
            said.append(f"compile {'blocks' if wanted else 'none'} ({reason})")
        if self.asked == "bf16_weights":
            log.warning(
                "the weights are bfloat16: without an optimizer that rounds stochastically, small updates vanish"
            )
        before = self._saved.get("precision", self.precision)
        if before != self.precision and self.world.rank == 0:
            log.warning("the run computed in %s up to its checkpoint, and goes on in %s", before, self.precision)
        if said and self.world.rank == 0:
            log.info("executor.plain on %s: %s", device.type, ", ".join(said))

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values: the gradient scaler and what was chosen; waits for the device."""
        state: dict[str, Any] = {"precision": self.precision, "compile": "blocks" if self._compiled else "none"}
        return state if self.scaler is None else state | {"scaler": self.scaler.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; before ``prepare``, or in the middle of a run that is rolled back.

        Raises:
            CheckpointError: the gradient scaler's state cannot be read.
        """
        self._saved = dict(state)
        if self.scaler is not None and "scaler" in state:
            self.scaler.restore(state["scaler"])
        if self._copies is not None:
            self._copies.changed()

    def forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        """Add the gradient of the summed loss over all micro batches to the parameters, times the scaler's scale.

        Args:
            micro_batches: this rank's, on any device, at least one.

        Returns:
            This rank's sums, detached float32 scalars on the device; summed over all ranks they are the whole.
        """
        assert micro_batches, "a step has at least one micro batch"
        self._place()
        if self.scaler is not None:
            self.scaler.start(micro_batches[0].tokens_BT.numel())
        if self._copies is not None:
            self._copies.changed()
        if not self._module.training:  # it walks through all modules
            self._module.train()
        last = len(micro_batches) - 1
        synchronize = getattr(self._module, "set_requires_gradient_sync", None)
        sums: LossSum | None = None
        for place, batch in enumerate(micro_batches):
            measured = place == 0 < last and self.after_first is not None
            if callable(synchronize):
                synchronize(place == last or measured)
            sums = _added(sums, self._proving("training", lambda batch=batch: self._micro_batch(batch)))
            if measured and self.after_first is not None:
                self.after_first(self._share(sums))
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
            return self._share(self._proving("evaluation", lambda: self._evaluated(batch)))
        finally:
            self._module.train(training)

    def _micro_batch(self, batch: Batch) -> LossSum:
        if self._copies is not None:
            # As under autocast, where casting weights is part of the forward.
            with self.phases.timed("forward"):
                self._copies.refresh()
        # Standing in backward too, where recomputed parts read the weights again.
        with self._standing():
            with self.phases.timed("forward"):
                part = self._forward(batch, self.loss)
            with self.phases.timed("backward"):
                loss = part.loss if self.scaler is None else part.loss * self.scaler.scale
                if self._copies is None:
                    loss.backward()
                else:
                    self._copies.backward(loss)
                # What is left of the graph goes here, before the next forward takes memory.
                del loss
                part = LossSum(part.loss.detach(), part.tokens.detach())
        return part

    def _forward(self, batch: Batch, loss: Loss) -> LossSum:
        batch = batch.to(self.world.device)
        dtype = self._choice.autocast
        own = batch.part(self.world.sequence_rank, self.world.sequence_size)
        with torch.autocast(self.world.device.type, dtype) if dtype is not None else nullcontext():
            return loss(call(self.model, batch), self.model.head, own)

    def _evaluated(self, batch: Batch) -> LossSum:
        if self._copies is not None:
            self._copies.refresh()
        with self._standing():
            return self._forward(batch, getattr(self.loss, "evaluation", self.loss))

    @contextmanager
    def _standing(self) -> Iterator[None]:
        """Working copies and compiled blocks stand in the model inside."""
        with ExitStack() as stack:
            if self._copies is not None:
                stack.enter_context(self._copies.standing())
            if self._compiled is not None:
                stack.enter_context(self._compiled.standing())
            yield

    def _share(self, sums: LossSum) -> LossSum:
        # Ranks that see the same data (tensor parallel) would otherwise be counted several times.
        share = self.world.data_size * self.world.sequence_size / self.world.size
        return LossSum(sums.loss.detach().float() * share, sums.tokens.detach().float() * share)

    def _proving(self, what: str, run: Callable[[], LossSum]) -> LossSum:
        """Run; the first time, where something that auto chose does not work, choose again and run once more."""
        if what in self._proven:
            return run()
        open_choices = "auto" in (self.asked, self.compile) and not self._sharded
        trial = Trial(self._module, self.world.device) if open_choices else None
        while True:
            try:
                sums = run()
            except RuntimeError as error:
                if trial is None or not self._choose_again(error):
                    if (explained := self._explained(error)) is not None:
                        raise explained from error
                    raise
                trial.undo()
            else:
                self._proven.add(what)
                return sums

    def _choose_again(self, error: Exception) -> bool:
        """Take back a choice of auto that ``error`` shows to be wrong; False where there is none."""
        if mixes_dtypes(error) and self.asked == "auto" and self._copies is not None:
            reason = f"bfloat16 weights do not work for {type(self.model).__name__}: {first_line(error)}"
            self._take(Choice("bf16_autocast", reason, autocast=torch.bfloat16))
        elif is_compile_error(error) and self.compile == "auto" and self._compiled is not None:
            self._compiled = None
            reason = f"compiling failed: {first_line(error)}"
        else:
            return False
        if self.world.rank == 0:
            log.warning("executor.plain goes on with precision %s and compile none: %s", self.precision, reason)
        return True

    def _explained(self, error: Exception) -> ConfigError | None:
        """What ``error`` means where an argument of the executor is the cause."""
        if mixes_dtypes(error) and self._copies is not None:
            return no_copies(self.model, error, self)
        if is_compile_error(error) and self._compiled is not None:
            return no_graph(self.model, error, self)
        return None

    def _auto_compile(self, steps: int, tokens_per_step: int) -> tuple[bool, str]:
        try:
            check_compile(self.model, self.world.device, self)
        except ConfigError as error:
            return False, error.message
        # With the shortest sequence attention counts for nothing, and a run is rather thought too short.
        flops = steps * tokens_per_step / self.world.size * self.model.flops_per_token(1)
        wanted, reason = worth_compiling(self.world.device, self.precision != "fp32", flops)
        before = self._saved.get("compile")
        if before is not None and (before == "blocks") != wanted:
            return before == "blocks", "as up to the checkpoint"
        return wanted, reason

    def _take(self, choice: Choice) -> None:
        self._choice = choice
        self.precision = choice.precision
        self._copies: WorkingCopies | None = None

    def _place(self) -> None:
        """Once there are values: move them to the device, round them, make copies."""
        if self._placed or on_meta(self.model):
            return  # on meta it is only being checked, or about to be given values by whoever shards it
        tensors = [*self._module.parameters(), *self._module.buffers()]
        if any(not hasattr(value, "to_local") and value.device != self.world.device for value in tensors):
            before = list(self._module.parameters())
            self._module.to(self.world.device)
            assert all(a is b for a, b in zip(before, self._module.parameters(), strict=True))
        if self.precision == "bf16_weights":
            round_weights(self._module)
        if self._choice.copies:
            self._copies = WorkingCopies(self._module, torch.bfloat16)
        self._placed = True


def _added(total: LossSum | None, part: LossSum) -> LossSum:
    return part if total is None else LossSum(total.loss + part.loss, total.tokens + part.tokens)
