"""Who trains: each one's environment and command."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environments
from environments import Environment, Made
from models import Case

DRIVERS = Path(__file__).parent / "drivers"
OURS = "ours"
PEAK = "matmul"
PACKAGES = ("modalities-core", "modalities-models", "modalities-data", "modalities-parallel", "modalities-cli")
TORCH = "torch==2.13.0"
PLAIN = Environment("plain", ((TORCH, "numpy"),), ("torch",))
TRANSFORMERS = Environment(
    "transformers", ((TORCH, "transformers==5.23.0", "accelerate"),), ("transformers", "accelerate", "torch")
)
LITGPT = Environment("litgpt", ((TORCH, "litgpt==0.5.13"),), ("litgpt", "torch"))
TITAN = Environment(
    "torchtitan", ((TORCH, "torchtitan==0.3.0", "torchao==0.18.0"),), ("torchtitan", "torchao", "torch")
)


@dataclass(frozen=True)
class Peer:
    """One way to train.

    driver: script in ``drivers``.
    environment: what it needs; None is this Python.
    spec: what the driver gets beside the case.
    same_model: whether it is the Llama of the case; nanochat's has other parts.
    """

    driver: str
    environment: Environment | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    same_model: bool = True


def peers(case: Case, nanochat: Path | None, overrides: list[str]) -> dict[str, Peer]:
    """All that can train ``case``, ours first."""
    found = {
        name: Peer("ours", None, {"options": options, "overrides": overrides}) for name, options in case.ours.items()
    }
    fp32, bf16 = {"precision": "fp32", "compile": False}, {"precision": "bf16", "compile": False}
    best = {"precision": "bf16", "compile": True}
    found |= {
        "plain, eager": Peer("plain", PLAIN, bf16),
        "plain": Peer("plain", PLAIN, best),
        "hf, defaults": Peer("hf_trainer", TRANSFORMERS, fp32),
        "hf, best": Peer("hf_trainer", TRANSFORMERS, best),
        "litgpt": Peer("litgpt_model", LITGPT, best),
    }
    if nanochat is not None:
        found["nanochat"] = Peer("nanochat_model", PLAIN, {**best, "repository": str(nanochat)}, same_model=False)
    if case.device == "cuda":
        found["torchtitan"] = Peer("titan", TITAN, best)
        if any("float8" in options for options in case.ours.values()):
            found["torchtitan, fp8"] = Peer("titan", TITAN, {**best, "fp8": True})
    return found


def ready(peer: Peer, cache: Path) -> Made:
    """This Python if it has all that the peer needs, else an environment of its own.

    Raises:
        InstallError: it cannot be made.
    """
    shows = (*PACKAGES, "torch") if peer.environment is None else peer.environment.shows
    try:
        return Made(sys.executable, {name: importlib.metadata.version(name) for name in shows})
    except importlib.metadata.PackageNotFoundError:
        if peer.environment is None:
            raise
    return environments.make(cache, peer.environment)
