"""Modalities as a library: a component registered in code, then used by name in a run.

python examples/library_usage.py
"""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from modalities_cli.run import train
from modalities_core.registry import register

CONFIG = Path(__file__).parent.parent / "config_files" / "config_lorem_ipsum.yaml"


@register("schedule.half_sine")
@dataclass(frozen=True)
class HalfSine:
    """From zero up to the peak and back to zero, along half a sine wave.

    Args:
        steps: length of the run.
    """

    steps: int

    def __call__(self, step: int) -> float:
        """The factor on the peak learning rate for the zero-based ``step``."""
        return math.sin(math.pi * (step + 1) / (self.steps + 1))


def main() -> None:
    """Train the small model of ``config_lorem_ipsum.yaml`` for 20 steps with the schedule above."""
    overrides = ("settings.steps=20", 'trainer.schedule={component: schedule.half_sine, steps: "${settings.steps}"}')
    with tempfile.TemporaryDirectory() as folder:
        progress = train(CONFIG, overrides, Path(folder))
    print(f"trained {progress.step} steps on {progress.tokens} tokens")


if __name__ == "__main__":
    main()
