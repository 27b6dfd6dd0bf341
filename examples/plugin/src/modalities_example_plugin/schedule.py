"""A learning-rate schedule."""

from dataclasses import dataclass


@dataclass(frozen=True)
class InverseSquareRoot:
    """Linear warm-up, then decay with one over the square root of the step (Vaswani et al., 2017, section 5.3).

    Args:
        warmup_steps: steps until the peak, at least 1.
    """

    warmup_steps: int = 100

    def __post_init__(self) -> None:
        """Refuse a warm-up that would divide by zero."""
        if self.warmup_steps < 1:
            raise ValueError(f"warmup_steps must be at least 1, not {self.warmup_steps}")

    def __call__(self, step: int) -> float:
        """The factor on the peak learning rate for the zero-based ``step``; 1 at the end of the warm-up."""
        position = (step + 1) / self.warmup_steps
        return min(position, position**-0.5)
