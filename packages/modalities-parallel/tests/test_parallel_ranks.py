"""Several ranks do what one does: the oracle is the single process."""

from __future__ import annotations

import numpy as np
import pytest

RELATIVE = 1e-5


def arrays(path) -> dict[str, np.ndarray]:
    with np.load(path) as content:
        return dict(content)


def compare(run, tmp_path, ranks, world_options=None, *, one=None, history=RELATIVE, weights=RELATIVE, **options):
    """Train on one process (with the changes in ``one``) and on ``ranks``, and compare everything there is."""
    from parallel_programs import train

    alone = train(out=str(tmp_path / "one"), **(options | (one or {})))
    results = run(ranks, "train", world_options=world_options, out=str(tmp_path / "many"), **options)
    assert all(result["sharded"] for result in results)
    assert all(result["dtypes"] == ["torch.float32"] for result in results)
    assert sorted(result["data"] for result in results) == [[rank, ranks] for rank in range(ranks)]
    for result in results:
        np.testing.assert_allclose(result["history"], alone["history"], rtol=history)
    before, expected = arrays(tmp_path / "many-before.npz"), arrays(tmp_path / "one-before.npz")
    assert before.keys() == expected.keys()
    assert all(np.array_equal(before[name], expected[name]) for name in expected)
    after, expected = arrays(tmp_path / "many-after.npz"), arrays(tmp_path / "one-after.npz")
    for name in expected:
        np.testing.assert_allclose(after[name], expected[name], rtol=weights, atol=weights, err_msg=name)
        if name.endswith(("weight", "bias")):
            assert not np.array_equal(after[name], before[name]), f"{name} was never trained"
    return alone, results


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_two_ranks_train_as_one(on_ranks, tmp_path):
    alone, results = compare(on_ranks, tmp_path, 2, tie="read", accumulation=3, evaluate=True)
    assert results[0]["local"] < 0.6 * alone["local"]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("tie", ["none", "shared"])
def test_two_ranks_train_as_one_with_any_head(on_ranks, tmp_path, tie, accumulation):
    one = {"accumulation": 4}
    compare(on_ranks, tmp_path, 2, tie=tie, accumulation=accumulation, one=one, reshard_after_forward=False)


@pytest.mark.slow
@pytest.mark.parametrize("tie", ["none", "read"])
def test_a_loss_that_calls_the_head_in_chunks(on_ranks, tmp_path, tie):
    compare(on_ranks, tmp_path, 2, tie=tie, accumulation=2, loss="chunked", one={"loss": "weighted"}, evaluate=True)


@pytest.mark.slow
def test_two_replicas(on_ranks, tmp_path):
    alone, results = compare(on_ranks, tmp_path, 2, {"dp_replicate": 2}, tie="read", accumulation=2)
    assert results[0]["local"] == alone["local"]


@pytest.mark.slow
def test_two_replicas_of_two_shards(on_ranks, tmp_path):
    alone, results = compare(on_ranks, tmp_path, 4, {"dp_replicate": 2, "dp_shard": 2}, accumulation=3)
    assert results[0]["local"] < 0.6 * alone["local"]


@pytest.mark.slow
def test_four_shards_some_of_them_empty(on_ranks, tmp_path):
    compare(on_ranks, tmp_path, 4, tie="read", accumulation=1, one={"accumulation": 2})


@pytest.mark.slow
def test_one_rank_under_torchrun(on_ranks, tmp_path):
    compare(on_ranks, tmp_path, 1, tie="read", accumulation=2, evaluate=True)


@pytest.mark.slow
def test_bf16_is_close(on_ranks, tmp_path):
    one = {"param_dtype": "fp32"}
    _, results = compare(
        on_ranks, tmp_path, 2, tie="read", accumulation=2, param_dtype="bf16", one=one, history=2e-2, weights=3e-2
    )
    exact, _ = compare(on_ranks, tmp_path, 2, tie="read", accumulation=2, one=one)
    assert results[0]["history"] != exact["history"], "bf16 changed nothing, so it was not used"


@pytest.mark.slow
def test_what_a_world_says_and_hears(on_ranks):
    results = on_ranks(4, "talk")
    assert [result["rank"] for result in results] == [0, 1, 2, 3]
    for result in results:
        assert result["mesh"] == [2, 2]
        assert result["axes"] == ["dp_replicate", "dp_shard"]
        assert result["heard"] == {"rank": 0, "text": "größer", "numbers": [1, 2.5, None]}
        assert result["total"] == [4.0, 6.0]
        assert result["norm"] == [7.0, 25.0, 4.0]
        assert result["nothing"] == 0.0
        assert "parallel.fsdp2" in result["refusal"]


@pytest.mark.slow
def test_a_missing_rank_is_named(outcomes_on_ranks):
    outcomes = outcomes_on_ranks(3, "late", seconds=10.0)
    assert outcomes[0]["exit_code"] == outcomes[2]["exit_code"] == 6
    assert "rank 1 did not reach a barrier within 10 s" in outcomes[0]["log"]
    assert "Traceback" not in outcomes[0]["log"]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["dp_shard", "tp"])
def test_no_axis_of_the_mesh_waits_longer_than_the_world(outcomes_on_ranks, axis):
    outcomes = outcomes_on_ranks(2, "late_along", axis=axis, seconds=10.0)
    assert 8 < outcomes[0]["result"] < 15


@pytest.mark.slow
def test_a_rank_that_leaves_ends_the_others(outcomes_on_ranks):
    outcomes = outcomes_on_ranks(2, "dies", seconds=20.0)
    assert outcomes[0]["exit_code"] == 6
    assert "rank 0 of 2 lost the others during a sum" in outcomes[0]["log"]


@pytest.mark.slow
def test_a_stale_environment_does_not_wait_forever(outcomes_on_ranks):
    (outcome,) = outcomes_on_ranks(1, "meet", environment={"WORLD_SIZE": "2"})
    assert outcome["exit_code"] == 6
    assert "rank 0 waited 2 s for all 2 ranks to meet at 127.0.0.1" in outcome["log"]
    assert "unset RANK" in outcome["log"]


@pytest.mark.slow
def test_a_port_in_use_is_named(outcomes_on_ranks):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (outcome,) = outcomes_on_ranks(1, "meet", environment={"MASTER_PORT": port})
    assert outcome["exit_code"] == 6
    assert f"port {port} on 127.0.0.1 is in use" in outcome["log"]


@pytest.mark.slow
def test_ending_without_closing_does_not_crash(on_ranks):
    for _ in range(3):
        on_ranks(2, "forget_to_close")
