"""Runs on 2, 4 and 8 ranks learn what one process learns from the same document, and go on under other meshes.

A case is a mesh, a feature that changes the document, and the mesh under which the run goes on from its middle. With
``-rP`` each says how near it came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from parallel_matrix_parts import MIDDLE, NEAR, Launcher, farthest, logged, overrides

UNCLIPPED = ["trainer.clip_norm=null", "trainer.batches.micro_batch_size=4"]
MIXTURE = (
    "decoder.feedforward={component: feedforward.mixture_of_experts, experts: 4, experts_per_token: 2, "
    "intermediate_size: 24, shared_intermediate_size: 24, balance_rate: 0.01}"
)
RECOMPUTED = "model.model={component: recomputation.%s, model: '${decoder}'}"
FEATURES: dict[str, list[str]] = {
    "plain": [],
    "unclipped": UNCLIPPED,
    "norm_1": ["trainer.norm_order=1", "trainer.clip_norm=5"],
    "norm_inf": ["trainer.norm_order=.inf", "trainer.clip_norm=0.02"],
    "accumulation": ["trainer.batches.micro_batch_size=1"],
    "masked": ["trainer.batches.dataset.masked=true", "trainer.evaluations.0.batches.dataset.masked=true"],
    "documents": ["trainer.batches.dataset.separate=true", "trainer.evaluations.0.batches.dataset.separate=true"],
    "tied": ["decoder.tied_embeddings=true"],
    "gqa": ["decoder.key_value_heads=2", "decoder.query_key_norm=head"],
    "projection_norm": ["decoder.query_key_norm=projection", "decoder.norm_placement=post"],
    "bias": ["decoder.bias=true", "decoder.norm=layer", "decoder.activation=gelu", "decoder.positions=absolute"],
    "soft_caps": [
        "decoder.attention_softcap=5.0",
        "decoder.logit_softcap=3.0",
        "decoder.norm_placement=sandwich",
        "decoder.attention_windows=[8, null]",
    ],
    "mixture": [MIXTURE],
    "losses": ["trainer.executor.loss.z_loss=0.01", "trainer.executor.loss.label_smoothing=0.1"],
    "recomputed": [RECOMPUTED % "blocks"],
    "selective": [RECOMPUTED % "selective"],
    "muon": [*UNCLIPPED, "trainer.optimizer={component: optimizer.muon, model: '${model}', lr: 1e-2, eps: 1e-3}"],
    "compiled": ["trainer.executor.compile=blocks"],
}


# Its bfloat16 products make as much of rounding as of the gradient where that is nearly zero: one process that adds up
# its micro batches in another order is off by 2e-3.
MUON_OFF = 5e-3


class Case(NamedTuple):
    """What runs, and how it goes on.

    mesh: degrees of world.auto, as in ``tp 2 dp_shard 2``.
    feature: of ``FEATURES``.
    then: the mesh under which it goes on from its middle; empty for one process.
    schedule: of executor.pipeline; empty for executor.plain.
    more: further overrides of this run, but not of the single process.
    off: how far weights may be from those of one process; 0 where sums are made in the same order. Losses may be as
        far, or ``NEAR``.
    """

    mesh: str
    feature: str
    then: str
    schedule: str = ""
    more: tuple[str, ...] = ()
    off: float = NEAR

    @property
    def name(self) -> str:
        return "-".join([self.mesh.replace(" ", "_"), *([self.schedule] if self.schedule else []), self.feature])


QUICK = [
    Case("dp_shard 2", "unclipped", "dp_replicate 2", off=0),
    Case("tp 2", "tied", "dp_shard 2"),
    Case("pp 2", "masked", "tp 2", "1f1b", off=0),
]
SLOW = [
    Case("dp_shard 2", "muon", "", off=0),
    Case("dp_shard 2", "accumulation", "dp_shard 4"),
    Case("dp_shard 2", "compiled", "pp 2"),
    Case("dp_replicate 2", "norm_inf", "dp_shard 2"),
    Case("dp_shard 4", "masked", "tp 2 dp_shard 2"),
    Case("dp_shard 4", "norm_1", "cp 2"),
    Case("dp_replicate 2 dp_shard 2", "documents", "cp 2 dp_shard 2"),
    Case("dp_shard 2", "tied", "tp 2 dp_shard 2"),
    Case("tp 2", "projection_norm", "cp 2"),
    Case("tp 2", "soft_caps", "pp 2"),
    Case("tp 2", "losses", ""),
    Case("tp 2", "compiled", "dp_shard 2"),
    Case("tp 2", "muon", "dp_shard 2", off=MUON_OFF),
    Case("tp 4", "norm_1", "dp_shard 2"),
    Case("tp 2 dp_shard 2", "bias", "pp 2 dp_shard 2"),
    Case("dp_replicate 2 tp 2", "masked", "dp_shard 4"),
    Case("cp 2", "selective", "tp 2"),
    Case("cp 2", "bias", "dp_shard 2"),
    Case("cp 4", "gqa", "dp_shard 2"),
    Case("cp 2 dp_shard 2", "documents", "dp_shard 4"),
    Case("cp 2 tp 2", "gqa", "pp 2 tp 2"),
    Case("pp 2", "unclipped", "dp_shard 2", "gpipe", off=0),
    Case("pp 2", "norm_inf", "dp_shard 4", "interleaved_1f1b", more=("model.stages_per_rank=2",), off=0),
    Case("pp 2", "recomputed", "", "1f1b", off=0),
    Case("pp 2", "soft_caps", "cp 2", "zero_bubble", off=0),
    Case("pp 2", "muon", "dp_shard 2", "1f1b", off=0),
    Case("pp 2 dp_shard 2", "masked", "tp 2 dp_shard 2", "1f1b"),
    Case("pp 2 dp_replicate 2", "losses", "cp 2 tp 2", "zero_bubble"),
    Case("pp 2 tp 2", "bias", "cp 2 dp_shard 2", "gpipe"),
    Case("pp 2 cp 2", "documents", "tp 4", "1f1b"),
    Case("pp 4", "losses", "dp_replicate 2 tp 2", "1f1b", off=0),
    Case("pp 2 dp_shard 2 tp 2", "plain", "dp_replicate 2 dp_shard 2 tp 2", "1f1b"),
    Case("dp_shard 2 ep 2", "mixture", ""),
    Case("dp_shard 4 ep 2", "mixture", "dp_shard 2 ep 2"),
    Case("tp 2 dp_shard 2", "mixture", "dp_shard 4 ep 4"),
    Case("cp 2 dp_shard 2 ep 2", "mixture", "tp 2"),
    Case("pp 2 dp_shard 2 ep 2", "mixture", "cp 2 ep 2", "1f1b"),
]


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def alone(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one process's run of a feature, with its weights, made when it is first asked for."""
    parent = tmp_path_factory.mktemp("alone")

    def run(feature: str) -> Path:
        folder = parent / feature
        if not folder.exists():
            launcher.run("", folder, FEATURES[feature], weights=parent / f"{feature}.npz")
        return folder

    return run


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.name) for case in QUICK),
        *(pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_a_mesh_learns_what_one_process_learns(case: Case, launcher, alone, tmp_path: Path) -> None:
    reference = alone(case.feature)
    common = {"reference": f"{reference}.npz"}
    assert logged(reference)["loss", 10] < logged(reference)["loss", 1] - 0.2, "nothing is learned"
    options = [*FEATURES[case.feature], *overrides(case.mesh, case.schedule), *case.more]
    results = launcher.run(case.mesh, tmp_path / "whole", options, **common)
    assert all(result["sharded"] for result in results)
    off_loss, off = farthest(results, tmp_path / "whole", reference, first=0)
    options = [*FEATURES[case.feature], *overrides(case.then)]
    results = launcher.run(case.then, tmp_path / "then", options, copy=tmp_path / "whole" / MIDDLE, **common)
    off_loss_then, off_then = farthest(results, tmp_path / "then", reference, first=6)
    then = case.then or "one process"
    print(f"{case.name}: {off_loss:.0e} {off:.0e}; then {then}: {off_loss_then:.0e} {off_then:.0e}")
    most = max(NEAR, case.off)
    assert off_loss <= most and off <= case.off
    assert off_loss_then <= most and off_then <= most
