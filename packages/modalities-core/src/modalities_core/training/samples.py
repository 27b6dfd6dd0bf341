"""Samples of text as a run goes: what the model would write by now."""

from __future__ import annotations

from collections.abc import Sequence

from modalities_core.errors import ConfigError, NumericalError
from modalities_core.events import Generated, Warned
from modalities_core.interfaces import TextGenerator, Training


class Samples:
    """Lets the model continue the same prompts every so many steps and after the last one.

    It takes nothing from training: neither random numbers nor time that counts as training. On several ranks each
    generates the same, for a sharded model runs on all of them; rank 0's texts are reported.

    Args:
        generator: continues texts, such as generation.text with the run's model.
        prompts: the texts to continue; an empty one starts a document.
        every: steps between two samples.

    Raises:
        ConfigError: there are no prompts, or ``every`` is not positive.
    """

    def __init__(self, generator: TextGenerator, prompts: Sequence[str], every: int) -> None:
        if not prompts:
            raise ConfigError('there is nothing to continue; [""] starts a document', about=(self, "prompts"))
        if every < 1:
            raise ConfigError(f"every has to be at least 1 step, not {every}", about=(self, "every"))
        self.generator = generator
        self.prompts = tuple(prompts)
        self.every = every
        self._training: Training | None = None

    def start(self, training: Training) -> None:
        """Note where to report."""
        self._training = training

    def after_step(self, step: int) -> None:
        """Generate if it is time; collective."""
        training = self._training
        assert training is not None, "a hook is started before the first step"
        if step % self.every and step != training.steps:
            return
        try:
            texts = self.generator(self.prompts)
        except NumericalError as error:
            # What becomes of a run with such weights is for the trainer to decide.
            training.emit(Warned(f"no samples of text after step {step}: {error.message}"))
            return
        for prompt, text in zip(self.prompts, texts, strict=True):
            training.emit(Generated(step, prompt, text))

    def close(self) -> None:
        """Let go of the run."""
        self._training = None
