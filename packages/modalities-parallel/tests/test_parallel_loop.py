"""The loop on ranks: any split is the whole batch, and all ranks decide alike about what is not finite."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from loop_programs import OPTIMIZER, splits
from parallel_small_model import SAMPLES, SmallModel, batch

STEPS = 5
RELATIVE = 1e-5
CLIPS = [("2", 0.5), ("1", 5.0), ("inf", 0.05), ("2", None)]


@functools.cache
def reference(order: float, clip_norm: float | None) -> tuple[list[tuple[float, float]], dict[str, np.ndarray]]:
    """The whole batch at once in float64, clipped and stepped by the formulas (arXiv:1711.05101, algorithm 2)."""
    model = SmallModel("read")
    model.load_state_dict(dict(model.initial_values()))
    return trained(model.double(), order, clip_norm)


def trained(model, order, clip_norm):
    parameters = list(model.parameters())
    first = [torch.zeros_like(value) for value in parameters]
    second = [torch.zeros_like(value) for value in parameters]
    (beta1, beta2), lr, eps = OPTIMIZER["betas"], OPTIMIZER["lr"], OPTIMIZER["eps"]
    history = []
    for step in range(1, STEPS + 1):
        samples = batch(step - 1, 0, SAMPLES)
        logits = model.head(model(samples.tokens_BT)).flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, samples.targets_BT.flatten(), reduction="none")
        weights = samples.weights_BT.flatten().double()
        loss = (each * weights).sum() / weights.sum()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.linalg.vector_norm(torch.cat([value.flatten() for value in gradients]), order).item()
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        with torch.no_grad():
            for value, gradient, m, v in zip(parameters, gradients, first, second, strict=True):
                m.mul_(beta1).add_((1 - beta1) * factor * gradient)
                v.mul_(beta2).add_((1 - beta2) * (factor * gradient) ** 2)
                unbiased = (v / (1 - beta2**step)).sqrt() + eps
                value.sub_(lr * OPTIMIZER["weight_decay"] * value + lr * m / (1 - beta1**step) / unbiased)
        history.append((loss.item(), norm))
    return history, {name: value.detach().numpy() for name, value in model.named_parameters()}


def check(tmp_path, cases, histories, out):
    for place, ((size, order, clip_norm), found) in enumerate(zip(cases, histories, strict=True)):
        history, expected = reference(float(order), clip_norm)
        assert clip_norm is None or min(norm for _, norm in history) > clip_norm, "the clipping would not show"
        np.testing.assert_allclose(found, history, rtol=RELATIVE, err_msg=f"micro batches of {size}, norm {order}")
        with np.load(f"{out}-{place}.npz") as arrays:
            assert set(arrays) == set(expected)
            for name, value in expected.items():
                apart = np.linalg.norm(arrays[name] - value) / np.linalg.norm(value)
                assert apart < RELATIVE, f"{name} with micro batches of {size}, norm {order}: {apart}"


def cases_for(ranks, clips):
    """Every micro batch size with so many of the ways to clip, in turn."""
    share = SAMPLES // ranks
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    return [(size, *CLIPS[(place + other) % len(CLIPS)]) for place, size in enumerate(sizes) for other in range(clips)]


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_any_accumulation_is_the_whole_batch(tmp_path):
    cases = cases_for(1, clips=1)
    check(tmp_path, cases, splits(cases, str(tmp_path / "out"), str(tmp_path)), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "degrees"), [(1, {}), (2, {}), (4, {}), (2, {"dp_replicate": 2}), (4, {"dp_replicate": 2})]
)
def test_any_split_over_ranks_is_the_whole_batch(on_ranks, tmp_path, ranks, degrees):
    cases = cases_for(ranks, clips=2)
    out = str(tmp_path / "out")
    results = on_ranks(
        ranks, "loop_programs:splits", cases=cases, out=out, folder=str(tmp_path), timeout=280.0, **degrees
    )
    check(tmp_path, cases, results[0], out)


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_all_ranks_decide_alike_about_what_is_not_finite_on_one(on_ranks, tmp_path, what, lag):
    results = on_ranks(2, "loop_programs:refusals", folder=str(tmp_path), what=what, lag=lag, timeout=280.0)
    first = results[0]
    for name, outcome in first.items():
        shared = ("error", "code", "digest")
        assert all([found[name][key] for key in shared] == [outcome[key] for key in shared] for found in results)
    for name in ("stop", "stop again"):
        assert first[name]["code"] == 7
        assert first[name]["error"].startswith("step 4 ")
        assert "the samples are 36 to 47 of the run" in first[name]["error"]
        assert ("not finite on rank 1 of 2 ranks" in first[name]["error"]) == (what == "loss")
        assert first[name]["digest"] == first["three steps"]["digest"]
    assert first["stop again"]["starts"] == [2]
    assert first["skip"]["digest"] == first["then skip"]["digest"] == first["without"]["digest"]
    assert [len(first[name]["warnings"]) for name in ("skip", "then skip", "without")] == [1, 1, 0]
    assert (first["too many"]["code"], first["too many"]["digest"]) == (7, first["three steps"]["digest"])
    assert first["too many"]["error"].startswith("step 5 ")
    assert first["back"]["digest"] == first["elsewhere"]["digest"] == first["rest of back"]["digest"]
    assert (first["back"]["starts"], first["rest of back"]["starts"]) == ([0, 4], [7])
    assert len(first["back"]["back"]) == 1
