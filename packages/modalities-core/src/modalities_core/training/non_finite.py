"""What the host does about steps whose loss or gradient is not finite; the device has refused them already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from modalities_core.errors import ConfigError, NumericalError
from modalities_core.events import Warned
from modalities_core.interfaces import World
from modalities_core.training.checkpointing import Checkpoints
from modalities_core.training.journal import Journal
from modalities_core.training.steplog import StepTaken

NonFinite = Literal["stop", "skip", "roll_back"]


def check_policy(owner: object, non_finite: NonFinite, checkpoints: Checkpoints | None) -> None:
    """Refuse a policy that is none, or that needs checkpoints where there are none.

    Raises:
        ConfigError: naming the argument.
    """
    if non_finite not in get_args(NonFinite):
        raise ConfigError(f"non_finite is stop, skip or roll_back, not {non_finite!r}", about=(owner, "non_finite"))
    if non_finite == "roll_back" and checkpoints is None:
        raise ConfigError(
            "non_finite is roll_back, but without checkpoints there is nothing to go back to",
            hint="give the run checkpoints, or set non_finite to skip or stop",
            about=(owner, "non_finite"),
        )


class RollBack(NumericalError):
    """Go back to the newest checkpoint and leave out the data up to ``batch``, the zero-based batch that was bad."""

    def __init__(self, error: NumericalError, batch: int) -> None:
        super().__init__(error.message, hint=error.hint)
        self.batch = batch


class Policy:
    """Warns of bad steps or ends the run, as configured; also knows which batches are left out.

    Args:
        non_finite: ``stop``, ``skip`` or ``roll_back``.
        most_skips: bad steps in a row that ``skip`` leaves out.
        most_roll_backs: how often ``roll_back`` goes back.
    """

    def __init__(self, non_finite: NonFinite, most_skips: int, most_roll_backs: int) -> None:
        self.non_finite = non_finite
        self.most_skips = most_skips
        self.most_roll_backs = most_roll_backs
        self.left_out = 0
        self.roll_backs = 0
        self.errors_in_row = 0
        self.overflows_in_row = 0

    @property
    def patience(self) -> int:
        """Bad steps in a row before nothing may change any more."""
        return self.most_skips if self.non_finite == "skip" else 0

    def state(self) -> dict[str, int]:
        """JSON values for a checkpoint: batches left out by going back, how often that was, and bad steps in a row."""
        return {name: getattr(self, name) for name in ("left_out", "roll_backs", "errors_in_row", "overflows_in_row")}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint's state, or from none."""
        self.left_out = state.get("left_out", 0)
        # A checkpoint from before the run went back knows less than this process.
        self.roll_backs = max(self.roll_backs, state.get("roll_backs", 0))
        self.errors_in_row = state.get("errors_in_row", 0)
        self.overflows_in_row = state.get("overflows_in_row", 0)

    def gone_back(self, to_step: int, batch: int) -> None:
        """The run goes on after ``to_step`` steps with the batch after ``batch``."""
        self.roll_backs += 1
        self.left_out = batch + 1 - to_step

    def heard(self, taken: StepTaken, world: World, journal: Journal) -> None:
        """Act on what the device found in a step; the same on every rank.

        Raises:
            NumericalError: the run ends.
            RollBack: it goes on from an earlier checkpoint.
        """
        totals = taken.totals
        self.errors_in_row, self.overflows_in_row = totals.errors_in_row, totals.overflows_in_row
        if totals.halted:
            raise self._end(taken, world)
        if totals.errors_in_row:
            skipped = f"it was left out, the {_ordinal(totals.errors_in_row)} in a row"
            journal.emit(Warned(f"{_description(taken, world)}; {skipped}"))

    def _end(self, taken: StepTaken, world: World) -> NumericalError:
        totals = taken.totals
        message = _description(taken, world)
        hint = "look at these samples, lower the learning rate or clip_norm, or compute in fp32"
        if totals.overflows_in_row:
            message += f"; the gradient has overflowed {totals.overflows_in_row} times in a row at ever lower scales"
        elif self.non_finite == "skip":
            message += f"; that makes {totals.errors_in_row} steps in a row, and most_skips is {self.most_skips}"
        elif self.non_finite == "roll_back" and self.roll_backs < self.most_roll_backs:
            return RollBack(NumericalError(message, hint=hint), taken.batch)
        elif self.non_finite == "roll_back":
            message += f"; the run went back {self.roll_backs} times already, and most_roll_backs allows no more"
        else:
            hint += "; non_finite=skip or roll_back would go on without them"
        return NumericalError(
            message,
            hint=f"the weights were not changed by it; {hint}, then run again to continue from the last checkpoint",
        )


def _description(taken: StepTaken, world: World) -> str:
    totals = taken.totals
    return (
        f"step {taken.progress.step} has a loss of {totals.mean_loss} and a gradient norm of {totals.gradient_norm}; "
        f"the loss is {_where(totals.bad_ranks, world.size)}; the samples are {taken.samples.start} to "
        f"{taken.samples.stop - 1} of the run"
    )


def _where(bad_ranks: Sequence[int], ranks: int) -> str:
    if not bad_ranks:
        return "finite on every rank" if ranks > 1 else "finite"
    if ranks == 1:
        return "not finite"
    names = ", ".join(map(str, bad_ranks[:16])) + (" and more" if len(bad_ranks) > 16 else "")
    return f"not finite on rank{'s' if len(bad_ranks) > 1 else ''} {names} of {ranks} ranks"


def _ordinal(number: int) -> str:
    return "first" if number == 1 else f"{number}th" if number > 3 else ("second", "third")[number - 2]
