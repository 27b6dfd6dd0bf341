"""The mixture of experts against a loop in float64 and against Hugging Face's blocks; its gradients and limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modalities_core.errors import ConfigError
from modalities_models.architecture import Architecture
from modalities_models.decoder import decoder
from modalities_models.nn.grouped_linear import grouped_linear
from modalities_models.nn.mixture_of_experts import MixtureOfExperts, SparseFeedForward
from modalities_models.parts import FeedForward, FeedForwardShape

D, E, K, INNER = 24, 6, 2, 16
NUMBERS = {"experts": E, "experts_per_token": K, "intermediate_size": INNER}
ACTS = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x) ** 2,
}


def sparse(activation: str = "swiglu", dtype: torch.dtype = torch.float64, **changes) -> SparseFeedForward:
    mixture = MixtureOfExperts(**NUMBERS | changes)
    built = mixture.build(FeedForwardShape(D, 40, activation, False), 0).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3)
    return built


def one_expert(module: SparseFeedForward, activation: str, expert: int, x: Tensor) -> Tensor:
    act = ACTS[activation]
    inner = module.up[expert] @ x
    inner = act(inner) if module.gate is None else act(module.gate[expert] @ x) * inner
    return module.down[expert] @ inner


def by_loop(module: SparseFeedForward, activation: str, hidden: Tensor) -> Tensor:
    """Every token and expert on its own, straight from the definition."""
    mixture = module.router.mixture
    rows = []
    for x in hidden.flatten(0, -2):
        logits = module.router.weight @ x
        scores = logits.softmax(0) if mixture.score == "softmax" else logits.sigmoid()
        ranked = scores if module.router.balance is None else scores + module.router.balance
        chosen = sorted(range(E), key=lambda e: -ranked[e].item())[:K]
        total = sum(scores[e] for e in chosen) if mixture.normalize_weights else 1.0
        row = sum(scores[e] / total * one_expert(module, activation, e, x) for e in chosen)
        if module.shared is not None:
            act = ACTS[activation]
            s, inner = module.shared, module.shared.up.weight @ x
            inner = act(inner) if not hasattr(s, "gate") else act(s.gate.weight @ x) * inner
            given = s.down.weight @ inner
            row = row + (given * (module.shared_gate.weight[0] @ x).sigmoid() if module.shared_gate else given)
        rows.append(row)
    return torch.stack(rows).view_as(hidden)


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "changes",
    [
        {"normalize_weights": False},
        {"shared_intermediate_size": 12, "balance_rate": 0.0},
        {"shared_intermediate_size": 12, "shared_gate": True},
    ],
)
def test_values_and_gradients_equal_a_loop_over_tokens_and_experts(activation, score, changes):
    module = sparse(activation, score=score, **changes)
    if module.router.balance is not None:
        module.router.balance.copy_(torch.linspace(-0.3, 0.3, E))
    hidden = torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5), requires_grad=True)
    direction = torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    got, wanted = module(hidden), by_loop(module, activation, hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    tensors = [hidden, *module.parameters()]
    for name, one, other in zip(
        ["hidden", *dict(module.named_parameters())],
        torch.autograd.grad((got * direction).sum(), tensors),
        torch.autograd.grad((wanted * direction).sum(), tensors),
        strict=True,
    ):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11, msg=name)


def huggingface_block(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": D, "num_experts_per_tok": K, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        return MixtralSparseMoeBlock(transformers.MixtralConfig(**common, num_local_experts=E, intermediate_size=INNER))
    common |= {"num_experts": E, "moe_intermediate_size": INNER}
    if kind == "qwen3":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        return Qwen3MoeSparseMoeBlock(transformers.Qwen3MoeConfig(**common, norm_topk_prob=True))
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    return Qwen2MoeSparseMoeBlock(
        transformers.Qwen2MoeConfig(**common, norm_topk_prob=False, shared_expert_intermediate_size=12)
    )


QWEN2 = {"normalize_weights": False, "shared_intermediate_size": 12, "shared_gate": True}
SHARED = {f"shared.{part}.weight": f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")}
RENAMED = {
    "router.weight": "gate.weight",
    "down": "experts.down_proj",
    "shared_gate.weight": "shared_expert_gate.weight",
}


def theirs_as_ours(name: str, tensors: dict[str, Tensor]) -> Tensor:
    if name in ("gate", "up"):
        return tensors["experts.gate_up_proj"].chunk(2, dim=1)[name == "up"]
    return tensors[(RENAMED | SHARED)[name]]


@pytest.mark.parametrize(("kind", "changes"), [("mixtral", {}), ("qwen3", {}), ("qwen2", QWEN2)])
def test_values_and_gradients_equal_hugging_face(kind, changes):
    theirs, ours = huggingface_block(kind), sparse(dtype=torch.float32, balance_rate=0.0, **changes)
    generator = torch.Generator().manual_seed(3)
    tensors = dict(theirs.named_parameters())
    with torch.no_grad():
        for parameter in tensors.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, parameter in ours.named_parameters():
            parameter.copy_(theirs_as_ours(name, tensors))
    hidden = torch.randn(4, 9, D, generator=generator)
    direction = torch.randn(4, 9, D, generator=generator)
    wanted, got = theirs(hidden.clone()), ours(hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    (wanted * direction).sum().backward()
    (got * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in tensors.items()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs_as_ours(name, gradients), rtol=1e-4, atol=1e-5, msg=name)


def test_experts_without_tokens_take_no_part():
    module = sparse(score="sigmoid")
    assert module.router.balance is not None
    module.router.balance.copy_(torch.tensor([9.0, 0, 0, 9.0, 0, 0]))
    hidden = torch.randn(2, 5, D, dtype=torch.float64)
    module(hidden).sum().backward()
    for name in ("gate", "up", "down"):
        gradient = module.get_parameter(name).grad
        assert [bool(part.any()) for part in gradient] == [True, False, False, True, False, False]
    assert module.router.load.tolist() == [10, 0, 0, 10, 0, 0]
    module.eval()(hidden)
    assert module.router.load.sum() == 20, "evaluation does not count"


def test_the_balance_decides_the_choice_but_not_the_weight():
    module = sparse(score="sigmoid", normalize_weights=False)
    hidden = torch.randn(1, 8, D, dtype=torch.float64)
    plain, plain_experts = module.router(hidden[0])
    module.router.balance.fill_(0.5)
    shifted, experts = module.router(hidden[0])
    assert torch.equal(plain_experts, experts) and torch.equal(plain, shifted)
    module.router.balance[3] = 5.0
    weights, experts = module.router(hidden[0])
    assert (experts == 3).any(-1).all() and weights.max() < 1


def test_scores_that_vanish_leave_a_finite_output():
    module = sparse(score="sigmoid", dtype=torch.float32)
    hidden = torch.randn(1, 4, D)
    with torch.no_grad():
        module.router.weight.copy_(-1e4 * hidden[0, 0])
    out = module(hidden)
    assert not module.router(hidden[0])[0][0].any(), "the first token's scores are all zero"
    assert out.isfinite().all() and not out[0, 0].any()


def test_grouped_products_pass_torchs_own_checks():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    ends = torch.tensor([2, 2, 7, 9], dtype=torch.int32)
    wanted = torch.cat([rows[:2] @ weight[0].T, rows[2:7] @ weight[2].T, rows[7:] @ weight[3].T])
    torch.testing.assert_close(grouped_linear(rows, weight, ends), wanted, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda r, w: grouped_linear(r, w, ends), (rows, weight))
    torch.library.opcheck(torch.ops.modalities.grouped_linear, (rows, weight, ends))
    none = grouped_linear(rows[:0], weight, torch.zeros(4, dtype=torch.int32))
    assert none.shape == (0, 3)


def test_runs_are_equal_to_the_bit():
    module = sparse(dtype=torch.float32)
    hidden = torch.randn(4, 64, D, generator=torch.Generator().manual_seed(1))
    seen = []
    torch.set_num_threads(2)
    for _ in range(4):
        module.zero_grad()
        value = module(hidden)
        value.square().sum().backward()
        seen.append([value, *(parameter.grad for parameter in module.parameters())])
    torch.set_num_threads(1)
    for others in seen[1:]:
        assert all(torch.equal(one, other) for one, other in zip(seen[0], others, strict=True))


def test_router_scores_in_float32_whatever_the_precision():
    module = sparse(dtype=torch.float32)
    hidden = torch.randn(1, 50, D)
    exact, experts = module.router(hidden[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, same = module.router(hidden[0])
        assert module(hidden).dtype == torch.bfloat16
    assert weights.dtype == torch.float32 and torch.equal(experts, same) and torch.equal(weights, exact)
    assert module.bfloat16().router(hidden[0].bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "experts must be positive"),
        ({"experts_per_token": 7}, "cannot pass through 7 of 6 experts"),
        ({"intermediate_size": -1}, "intermediate_size must be positive"),
        ({"shared_gate": True}, "nothing to gate"),
        ({"score": "cosine"}, "must be softmax or sigmoid"),
        ({"balance_rate": -0.1}, r"must be in \[0, 1\)"),
        ({"dense_layers": (2,)}, "dense_layers has 2, but the blocks are 0 to 1"),
    ],
)
def test_impossible_numbers_are_explained(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(MixtureOfExperts(**NUMBERS | changes))


def tiny(feedforward: FeedForward | None, **changes):
    numbers = {"vocab_size": 50, "sequence_length": 16, "hidden_size": D, "layers": 2, "heads": 2}
    return decoder(**numbers | changes, feedforward=feedforward)


def test_names_and_shapes_in_the_state_dict():
    mixture = MixtureOfExperts(**NUMBERS, shared_intermediate_size=12, shared_gate=True, dense_layers=(0,))
    model = tiny(mixture)
    assert isinstance(model.architecture, Architecture)
    shapes = {name.removeprefix("blocks.1.feedforward."): tuple(v.shape) for name, v in model.state_dict().items()}
    wanted = {
        "router.weight": (E, D),
        "router.balance": (E,),
        "gate": (E, INNER, D),
        "up": (E, INNER, D),
        "down": (E, D, INNER),
        "shared.gate.weight": (12, D),
        "shared.up.weight": (12, D),
        "shared.down.weight": (D, 12),
        "shared_gate.weight": (1, D),
    }
    inside = {name: shape for name, shape in shapes.items() if not name.startswith(("blocks", "emb", "norm", "head"))}
    assert inside == wanted
    assert shapes["blocks.0.feedforward.gate.weight"] == (64, D)
    assert "router.balance" not in str(tiny(MixtureOfExperts(**NUMBERS, balance_rate=0.0)).state_dict().keys())


def test_every_expert_starts_with_weights_of_its_own_and_the_published_spread():
    model = tiny(MixtureOfExperts(**NUMBERS | {"intermediate_size": 200, "shared_intermediate_size": 300}))
    values = dict(model.initial_values())
    for first, second in itertools.combinations(values["blocks.0.feedforward.up"], 2):
        assert not torch.equal(first, second)
    more = dict(tiny(MixtureOfExperts(**NUMBERS | {"experts": 9, "intermediate_size": 200})).initial_values())
    assert torch.equal(more["blocks.0.feedforward.up"][:E], values["blocks.0.feedforward.up"])
    for name, std in {"up": 0.02, "down": 0.01, "shared.down.weight": 0.01, "router.weight": 0.02}.items():
        assert values[f"blocks.1.feedforward.{name}"].std().item() == pytest.approx(std, rel=0.1), name
    assert not values["blocks.0.feedforward.router.balance"].any()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_values_and_gradients_equal_the_loop(dtype, tolerance):
    """In bfloat16 these are the grouped kernel's: widths of 16 and 24 elements are whole multiples of 16 bytes."""
    exact = sparse()
    module = sparse(dtype=torch.float32).to("cuda", dtype)
    hidden = torch.randn(2, 20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    # Rounded first, so that both route alike.
    hidden = hidden.to(dtype).double()
    with torch.no_grad():
        for parameter, other in zip(exact.parameters(), module.parameters(), strict=True):
            parameter.copy_(other)
    wanted, got = by_loop(exact, "swiglu", hidden), module(hidden.to("cuda", dtype))
    wanted.square().sum().backward()
    torch.cuda.set_sync_debug_mode("error" if dtype == torch.bfloat16 else "default")
    try:
        got.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (got.cpu().double() - wanted).norm() <= tolerance * wanted.norm()
    for name, parameter in module.named_parameters():
        gradient = exact.get_parameter(name).grad
        assert (parameter.grad.cpu().double() - gradient).norm() <= 2 * tolerance * gradient.norm(), name
