"""Runs a model whose blocks are spread over ranks, micro batches following each other through the stages.

Shape suffixes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Batch, Loss, LossSum, Model, World
from modalities_core.training.calling import call
from modalities_core.training.compiling import CompiledBlocks, check_compile, is_compile_error, no_graph
from modalities_core.training.parameters import as_module
from modalities_core.training.scaler import GradientScaler
from modalities_core.training.throughput import Phases
from modalities_parallel.pipeline.failures import explained
from modalities_parallel.pipeline.passing import Line
from modalities_parallel.pipeline.schedules import Name, build, check_micro_batches, check_stages
from modalities_parallel.pipeline.staged import Stages

log = logging.getLogger("modalities")


class Pipeline:
    """Forward and backward through the stages of a pipeline, whose ranks work on different micro batches at a time.

    The micro batches of a step are those of the schedule, so a step needs several; all of one step have the same
    shape. Every rank of a pipeline reads the same data and makes masks and positions itself: only hidden states and
    their gradients are sent. Gradients are sums, reduced over the data-parallel ranks once at the end of a step.

    What the trainer may use beside the Protocol: ``scaler`` where the model computes in float16, else None; ``phases``,
    in which waiting for other stages counts as other time; ``prepare``, ``state`` and ``restore``. The gradient noise
    scale is not measured.

    Args:
        model: from parallel.fsdp2 in a world with pp of at least 2.
        loss: what is summed up, on the ranks of the last stage.
        world: from world.auto.
        schedule: the order of work. ``gpipe`` (arXiv:1811.06965) does all forwards, then all backwards. ``1f1b``
            (arXiv:1806.03377) alternates, and holds as many micro batches as there are stages left.
            ``interleaved_1f1b`` (arXiv:2104.04473) does so with several stages on each rank, stages_per_rank of
            parallel.fsdp2, which shortens the time that ranks wait. ``zero_bubble`` (arXiv:2401.10241) computes the
            gradients of weights apart, while it would wait; with one or several stages on each rank, and with blocks
            that are neither recomputed nor compiled.
        compile: ``blocks`` compiles each block of this rank with torch.compile; ``none`` does not.

    Raises:
        ConfigError: the world has no pipeline, or the schedule does not fit the model's stages or how blocks are run.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        world: World,
        schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b",
        compile: Literal["blocks", "none"] = "none",
    ) -> None:
        if compile not in ("blocks", "none"):
            raise ConfigError(f"compile is blocks or none, not {compile!r}", about=(self, "compile"))
        self.model = model
        self.loss = loss
        self.world = world
        self.schedule: Name = schedule
        self.compile = compile
        self._module = as_module(model)
        self._check(world)
        self._stages = cast(Stages, getattr(model, "pipeline_stages", None))
        half = getattr(model, "computing_dtype", None) == torch.float16
        self.scaler = GradientScaler(world.device) if half else None
        self.phases = Phases(world.device)
        self._compiled: CompiledBlocks | None = None
        if compile == "blocks":
            check_compile(model, world.device, self)
            self._compiled = CompiledBlocks(model)
        self._line: Line | None = None
        if world.device.type != "meta":
            self._line = Line(cast(Any, world).meshes, world.device, getattr(world, "timeout", None))
        self._built: dict[Hashable, tuple[Any, Any]] = {}
        self._micro_batches: Sequence[Batch] = ()
        self._sums: LossSum | None = None

    def check_micro_batches(self, count: int) -> None:
        """Refuse steps of ``count`` micro batches if the schedule cannot share them out.

        Raises:
            ConfigError: it cannot; says what to set.
        """
        check_micro_batches(self.schedule, count, _degree(self.world), self)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values: the gradient scaler; waits for the device."""
        return {} if self.scaler is None else {"scaler": self.scaler.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            CheckpointError: the gradient scaler's state cannot be read.
        """
        if self.scaler is not None and "scaler" in state:
            self.scaler.restore(state["scaler"])

    def forward_backward(self, micro_batches: Sequence[Batch]) -> LossSum:
        """Add the gradient of the summed loss over all micro batches to the parameters, times the scaler's scale.

        Args:
            micro_batches: of this data-parallel rank, the same on every rank of a pipeline, of one shape.

        Returns:
            This rank's share of the sums: of ranks that hold the last stage, zeros of all others; detached float32
            scalars on the device.

        Raises:
            ConfigError: there are too few of them for the schedule.
            DataError: their shapes differ.
            DistributedError: another rank of the pipeline is gone or does not answer.
        """
        assert micro_batches, "a step has at least one micro batch"
        self.check_micro_batches(len(micro_batches))
        key = _key(micro_batches)
        self._micro_batches = [batch.to(self.world.device) for batch in micro_batches]
        self._sums = None
        if self.scaler is not None:
            self.scaler.start(micro_batches[0].tokens_BT.numel())
        self._module.train()
        try:
            schedule, stage = self._scheduled(key, len(micro_batches))
            self._reduce_later()
            places = torch.arange(len(micro_batches))
            received = (places,) if 0 in self._stages.held else ()
            with self._standing():
                schedule.step(*received, target=places, return_outputs=False, place=places)
            from modalities_parallel.pipeline.running import reduce_gradients

            with self.phases.timed("backward"):
                reduce_gradients(self._module, stage)
        except RuntimeError as error:
            told = self._told(error)
            raise told from told.__cause__
        finally:
            self._micro_batches = ()
        return self._share(self._sums)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossSum:
        """This rank's share of the sums on one batch, without gradients, in evaluation mode, which is put back.

        Sums the loss's ``evaluation`` where it has one. A rank does not wait for the stages after its own, so several
        batches are under way at a time.
        """
        training = self._module.training
        self._module.eval()
        try:
            batch = batch.to(self.world.device)
            with self._standing():
                sums = self._pass(batch, ("evaluation", *_shapes(batch)))
        except RuntimeError as error:
            told = self._told(error)
            raise told from told.__cause__
        finally:
            self._module.train(training)
        return self._share(sums)

    def _pass(self, batch: Batch, key: Hashable) -> LossSum | None:
        """A batch through this rank's stages, forward only; gives its sums where the last of them is here."""
        line, sums = cast(Line, self._line), None
        line.settle()
        for stage in self._stages.held:
            received_BTD = None if stage == 0 else line.receive(stage, key)
            output = self._forward(stage, received_BTD, batch)
            if self._stages.is_last(stage):
                sums = self._loss(output, batch, getattr(self.loss, "evaluation", self.loss))
            else:
                line.send(stage + 1, output, key)
        return sums

    def _run(self, stage: int, received_BTD: Tensor | None, place: int) -> Tensor:
        """A stage on one micro batch of the step; the last one gives a scalar with the gradient of the loss."""
        batch = self._micro_batches[place]
        output = self._forward(stage, received_BTD, batch)
        if not self._stages.is_last(stage):
            output = output.contiguous()
            # Torch detaches in place what it has sent, which a view does not allow.
            return output.clone() if output._is_view() else output
        # Backward through head and loss at once: logits are not kept while other micro batches come in between, and
        # no schedule takes apart what a loss computes in its own way.
        hidden_BTD = output.detach().requires_grad_()
        part = self._loss(hidden_BTD, batch, self.loss)
        (part.loss if self.scaler is None else part.loss * self.scaler.scale).backward()
        before = self._sums or LossSum(torch.zeros_like(part.loss), torch.zeros_like(part.tokens))
        self._sums = LossSum(before.loss + part.loss.detach(), before.tokens + part.tokens.detach())
        gradient_BTD = torch.zeros_like(output) if hidden_BTD.grad is None else hidden_BTD.grad
        return (output * gradient_BTD).sum(dtype=torch.float32)

    def _forward(self, stage: int, received_BTD: Tensor | None, batch: Batch) -> Tensor:
        with self._stages.running(stage, received_BTD):
            return call(self.model, batch)

    def _loss(self, hidden_BTD: Tensor, batch: Batch, loss: Loss) -> LossSum:
        own = batch.part(self.world.sequence_rank, self.world.sequence_size)
        return loss(hidden_BTD, self.model.head, own)

    def _scheduled(self, key: Hashable, count: int) -> tuple[Any, Any]:
        """The schedule for that many micro batches of one shape, and a stage of it; made when first needed."""
        if (key, count) in self._built:
            return self._built[key, count]
        from modalities_parallel.pipeline.running import StageRun, schedule_stage

        line, device, held = cast(Line, self._line), self.world.device, self._stages.held
        line.settle()
        self._learn_shapes(key)
        runs = {stage: StageRun(stage, self._run, self._module.parameters) for stage in held}
        of_all = (self._stages.count, line, key, device, self.phases)
        stages = [schedule_stage(run, stage, *of_all) for stage, run in runs.items()]
        schedule = build(self.schedule, stages, count, lambda loss, place: loss)
        # Only the latest, as each holds what it receives for all its micro batches.
        self._built = {(key, count): (schedule, stages[0])}
        return schedule, stages[0]

    def _learn_shapes(self, key: Hashable) -> None:
        """Send the first micro batch through all stages, so that each knows what it will be given."""
        stage = self._stages.held[0]
        if cast(Line, self._line).knows(stage or 1, key):
            return
        self._module.eval()  # without dropout, counting nothing: this pass leaves no trace
        try:
            with torch.no_grad():
                self._pass(self._micro_batches[0], key)
            cast(Line, self._line).settle()
        finally:
            self._module.train()

    def _reduce_later(self) -> None:
        """Let FSDP2 keep gradients, and unless asked for gathered weights, until the schedule has ended."""
        module = cast(Any, self._module)
        module.set_is_last_backward(False)
        module.set_requires_gradient_sync(False)
        module.set_reshard_after_backward(module.sharding.reshard_after_forward)

    def _standing(self) -> Any:
        return nullcontext() if self._compiled is None else self._compiled.standing()

    def _share(self, sums: LossSum | None) -> LossSum:
        if sums is None:
            zero = torch.zeros((), device=self.world.device)
            return LossSum(zero, zero.clone())
        # Ranks of the last stage that see the same data (tensor parallel) would otherwise be counted several times.
        world = self.world
        share = world.data_size * world.sequence_size * _degree(world) / world.size
        return LossSum(sums.loss.detach().float() * share, sums.tokens.detach().float() * share)

    def _told(self, error: RuntimeError) -> BaseException:
        """What to raise instead of what a schedule makes of an error."""
        if self._compiled is not None and is_compile_error(error.__cause__ or error):
            return no_graph(self.model, cast(Exception, error.__cause__ or error), self)
        return explained(error, self.world)

    def _check(self, world: World) -> None:
        if _degree(world) == 1:
            raise ConfigError(
                "executor.pipeline needs a pipeline, but pp of this world is 1",
                hint="use executor.plain, or set pp of world.auto to 2 or more",
                about=(self, "world"),
            )
        sharding = getattr(self.model, "sharding", None)
        if sharding is None or (world.device.type != "meta" and not hasattr(self.model, "pipeline_stages")):
            raise ConfigError(
                f"{type(self.model).__name__} is not cut into stages",
                hint="wrap the model in the component parallel.fsdp2",
                about=(self, "model"),
            )
        check_stages(self.schedule, sharding.stages_per_rank, self)
        if self.schedule == "zero_bubble" and (obstacle := self._whole_backward()):
            raise ConfigError(
                f"zero_bubble computes the gradients of weights apart from those of hidden states, but {obstacle}",
                hint="set schedule to interleaved_1f1b with two stages_per_rank, or to 1f1b",
                about=(self, "schedule"),
            )

    def _whole_backward(self) -> str:
        """Why backward cannot be taken apart, in words; empty where it can."""
        if self.compile != "none":
            return "compiled blocks compute both at once"
        if any(getattr(module, "recomputing", False) for module in self._module.modules()):
            return "recomputed blocks would have to be run once more for each"
        return ""


def _degree(world: World) -> int:
    """Ranks of a pipeline in ``world``; 1 where it has none."""
    meshes = getattr(world, "meshes", None)
    degrees = getattr(world, "degrees", None) if meshes is None else meshes.degrees
    return 1 if degrees is None else degrees.pp


def _shapes(batch: Batch) -> tuple[Hashable, ...]:
    tensors = (batch.tokens_BT, batch.weights_BT, batch.segments_BT, batch.images_BCHW)
    return tuple(None if tensor is None else tuple(tensor.shape) for tensor in tensors)


def _key(micro_batches: Sequence[Batch]) -> Hashable:
    shapes = {_shapes(batch) for batch in micro_batches}
    if len(shapes) > 1:
        sizes = sorted({str(tuple(batch.tokens_BT.shape)) for batch in micro_batches})
        raise DataError(
            f"the micro batches of a step have different shapes ({', '.join(sizes)}), which a pipeline cannot take",
            hint="let micro_batch_size divide the samples of every step",
        )
    return ("training", *shapes.pop())
