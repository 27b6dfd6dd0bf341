"""CoCa: what sees what, its loss against the published formula, its captions step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from modalities_core.errors import ConfigError
from modalities_core.interfaces import Batch, Loss, Model
from modalities_models.captions import generate_captions
from modalities_models.coca import CoCa
from modalities_models.initialization import Plain
from modalities_models.losses import CrossEntropy
from modalities_models.losses.coca import CoCaLoss, contrastive_loss
from modalities_models.vision import VisionTransformer

V, T, B = 31, 6, 5


class One:
    """The world of one process."""

    rank = data_rank = 0
    size = data_size = 1
    device = torch.device("cpu")

    def sum(self, values):
        return values


def vision(**more):
    return VisionTransformer(8, 4, 16, 2, 2, initialization=Plain(0.3), **more)


def coca(encoder=None, **more):
    sizes = {"hidden_size": 24, "text_layers": 2, "multimodal_layers": 2, "heads": 3, "embedding_size": 8, "queries": 4}
    return CoCa(encoder or vision(), V, T, initialization=Plain(0.3), **sizes | more)


def batch(seed=0, rows=B, padded=True):
    """Captions of 1 to T - 1 tokens between two ends (id 0), as dataset.image_text gives them."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T, (rows, 1), generator=draw) if padded else torch.full((rows, 1), T - 1)
    tokens = torch.randint(1, V, (rows, T + 1), generator=draw)
    places = torch.arange(T + 1)
    tokens[(places == 0) | (places > lengths)] = 0
    padding = places[:T] > lengths
    images = torch.randint(0, 256, (rows, 3, 8, 8), generator=draw, dtype=torch.uint8)
    return Batch(tokens[:, :-1], tokens[:, 1:], (~padding).float(), padding.int(), images)


def output_of(model, b):
    return model(b.tokens_BT, images_BCHW=b.images_BCHW, segments_BT=b.segments_BT)


def test_it_is_a_model_and_its_loss_a_loss():
    model = coca()
    assert isinstance(model, Model) and isinstance(CoCaLoss(One()), Loss)
    output = output_of(model, batch())
    assert output.hidden_BTD.shape == (B, T, 24) and model.head(output.hidden_BTD).shape == (B, T, V)
    for vectors in (output.images_BE, output.texts_BE):
        assert vectors.shape == (B, 8)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(B))
    assert output.scale.item() == pytest.approx(1 / 0.07)


def test_padding_changes_nothing():
    model, b = coca(), batch()
    other = b.tokens_BT.clone()
    other[b.segments_BT == 1] = torch.randint(1, V, (int(b.segments_BT.sum()),))
    assert not torch.equal(other, b.tokens_BT)
    first = output_of(model, b)
    second = model(other, images_BCHW=b.images_BCHW, segments_BT=b.segments_BT)
    torch.testing.assert_close(second.texts_BE, first.texts_BE)
    counted = b.weights_BT > 0
    torch.testing.assert_close(second.hidden_BTD[counted], first.hidden_BTD[counted])
    # And a caption is the same in whatever length it is padded to.
    for row in range(B):
        length = int(b.weights_BT[row].sum())
        alone = model.encode_texts(b.tokens_BT[row : row + 1, :length])
        torch.testing.assert_close(alone[0], first.texts_BE[row])


def test_captions_see_the_image_and_the_past_only():
    model, b = coca(), batch(padded=False)
    hidden = output_of(model, b).hidden_BTD
    changed = b.tokens_BT.clone()
    changed[:, 3] = (changed[:, 3] + 1) % V
    after = model(changed, images_BCHW=b.images_BCHW).hidden_BTD
    torch.testing.assert_close(after[:, :3], hidden[:, :3])
    assert ((after[:, 3:] - hidden[:, 3:]).abs().amax(-1) > 1e-4).all()
    other = output_of(model, Batch(b.tokens_BT, b.targets_BT, None, None, 255 - b.images_BCHW))
    assert ((other.hidden_BTD - hidden).abs().amax(-1) > 1e-4).all()
    torch.testing.assert_close(other.texts_BE, output_of(model, b).texts_BE)


def test_decoding_is_what_the_forward_pass_computes():
    model, b = coca().double(), batch(padded=False)
    hidden = output_of(model, b).hidden_BTD
    seen, images = model.encode_images(b.images_BCHW)
    assert seen.shape == (B, 4, 24)
    torch.testing.assert_close(images, output_of(model, b).images_BE)
    torch.testing.assert_close(model.decode(b.tokens_BT, seen), hidden)
    caches = model.caption_caches()
    pieces = [model.decode(part, seen, caches) for part in b.tokens_BT.split([2, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), hidden)


def test_captions_are_the_likeliest_tokens_one_by_one():
    model, b = coca(dropout=0.3), batch(rows=40)
    # Untrained, it hardly ever ends a caption: the id to end with is one that it does write, now and then.
    written = {end: generate_captions(model, b.images_BCHW, end_of_document=end) for end in range(V)}
    end, captions = max(written.items(), key=lambda item: len({len(caption) for caption in item[1]}))
    assert model.training and len({len(caption) for caption in captions}) > 1
    model.eval()
    for image, caption in zip(b.images_BCHW, captions, strict=True):
        tokens = [end]
        while len(tokens) <= T:  # the oracle: the whole model anew for each token, no cache
            hidden = model(torch.tensor([tokens]), images_BCHW=image[None]).hidden_BTD
            tokens.append(int(model.head(hidden[0, -1]).argmax()))
            if tokens[-1] == end:
                tokens.pop()
                break
        assert caption == tokens[1:]
    assert all(len(caption) <= 2 for caption in generate_captions(model, b.images_BCHW, 0, max_new_tokens=2))
    with pytest.raises(ConfigError, match="1 to 6 tokens"):
        generate_captions(model, b.images_BCHW, 0, max_new_tokens=7)


def test_the_contrastive_part_is_the_loss_of_clip():
    transformers = pytest.importorskip("transformers.models.clip.modeling_clip")
    images = nn.functional.normalize(torch.randn(7, 8, dtype=torch.float64), dim=1).requires_grad_()
    texts = nn.functional.normalize(torch.randn(7, 8, dtype=torch.float64), dim=1).requires_grad_()
    scale = torch.tensor([9.0], dtype=torch.float64, requires_grad=True)
    ours = contrastive_loss(images, texts, scale, torch.ones(7), One()) / 7
    loss = getattr(transformers, "clip_loss", None) or transformers.image_text_contrastive_loss
    theirs = loss(scale * texts @ images.T)
    torch.testing.assert_close(ours, theirs)
    values = (images, texts, scale)
    for got, wanted in zip(torch.autograd.grad(ours, values), torch.autograd.grad(theirs, values), strict=True):
        torch.testing.assert_close(got, wanted)


def test_pairs_without_weight_are_nobodys_counterpart():
    images, texts = (nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    weights = torch.tensor([2.0, 0.0, 1.0, 3.0, 0.0, 1.0])
    kept = weights > 0
    scale = torch.tensor([5.0])
    whole = contrastive_loss(images, texts, scale, weights, One())
    rest = contrastive_loss(images[kept], texts[kept], scale, weights[kept], One())
    torch.testing.assert_close(whole, rest)
    assert contrastive_loss(images, texts, scale, torch.zeros(6), One()).item() == 0


def test_the_loss_is_two_parts_of_captions_and_one_of_comparison():
    model, b = coca(), batch()
    output = output_of(model, b)
    found = CoCaLoss(One(), captioning_weight=2.0, contrastive_weight=1.0)(output, model.head, b)
    caption = CrossEntropy()(output.hidden_BTD, model.head, b)
    assert found.tokens == caption.tokens == b.weights_BT.sum()
    logits = output.scale * output.images_BE @ output.texts_BE.T
    each = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2
    expected = 2 * caption.loss + (each * b.weights_BT.sum(1)).sum()
    torch.testing.assert_close(found.loss, expected)
    alone = CoCaLoss(One(), captioning_weight=0.0)(output, model.head, b)
    torch.testing.assert_close(alone.loss, (each * b.weights_BT.sum(1)).sum())
    unweighted = CoCaLoss(One(), CrossEntropy(2), 1.0, 0.0)(output, model.head, Batch(b.tokens_BT, b.targets_BT))
    assert unweighted.tokens == B * T


def test_what_is_reported_is_the_loss_without_smoothing():
    model, b = coca(), batch()
    output, plain = output_of(model, b), CoCaLoss(One())
    assert plain.evaluation is plain
    smoothed = CoCaLoss(One(), CrossEntropy(label_smoothing=0.1))
    assert smoothed(output, model.head, b).loss != plain(output, model.head, b).loss
    assert smoothed.evaluation(output, model.head, b).loss == plain(output, model.head, b).loss


def test_the_loss_is_float32_under_autocast():
    images, texts = (nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    scale, weights = torch.tensor([50.0]), torch.ones(6)
    expected = contrastive_loss(images, texts, scale, weights, One())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(images, texts, scale, weights, One()), expected)


def test_every_parameter_is_trained():
    model, b = coca(), batch()
    CoCaLoss(One())(output_of(model, b), model.head, b).loss.backward()
    for name, value in model.named_parameters():
        assert value.grad is not None and value.grad.abs().max() > 0, name


def test_values_depend_on_name_and_seed_and_on_nothing_else():
    with torch.device("meta"):
        hollow = coca(seed=1)
    assert all(value.is_meta for value in hollow.parameters())
    whole, values = dict(coca(seed=1).named_parameters()), dict(hollow.initial_values())
    assert set(values) == set(whole)
    assert all(torch.equal(values[name], whole[name]) for name in whole)
    assert values["log_scale"].item() == pytest.approx(math.log(1 / 0.07))
    other = dict(coca(seed=2).named_parameters())
    assert torch.equal(other["vision.position_embedding"], whole["vision.position_embedding"])
    assert not torch.equal(other["position_embedding"], whole["position_embedding"])


@pytest.mark.slow
def test_blocks_compile_whole():
    model, b = coca(), batch()
    wanted = output_of(model, b)
    torch.compiler.reset()
    for block in (*model.vision.blocks, *model.text_blocks, *model.blocks):
        block.compile(fullgraph=True, backend="aot_eager")
    for got, expected in zip(output_of(model, b), wanted, strict=True):
        torch.testing.assert_close(got, expected)
    CoCaLoss(One())(output_of(model, b), model.head, b).loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_as_on_the_cpu(precision):
    model, b = coca(), batch(rows=16)
    wanted = CoCaLoss(One())(output_of(model, b), model.head, b)
    model.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        moved = b.to("cuda")
        found = CoCaLoss(One())(output_of(model, moved), model.head, moved)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-4 if precision == "fp32" else 3e-2)
    assert found.tokens.item() == wanted.tokens.item()
    captions = generate_captions(model, moved.images_BCHW, end_of_document=0)
    assert len(captions) == 16 and all(value.grad.isfinite().all() for value in model.parameters())


def test_a_trained_encoder_keeps_its_values():
    encoder = vision()
    with torch.no_grad():
        encoder.position_embedding.fill_(7.0)
    assert (coca(encoder).vision.position_embedding == 7.0).all()


def test_the_scale_of_similarities_is_bounded():
    model = coca()
    with torch.no_grad():
        model.log_scale.fill_(20.0)
    assert output_of(model, batch()).scale.item() == pytest.approx(100.0)


def test_flops_are_those_that_are_counted():
    counter = pytest.importorskip("torch.utils.flop_counter")
    model, b = coca(), batch(padded=False)
    with counter.FlopCounterMode(display=False) as counted:
        output = output_of(model, b)
        CrossEntropy()(output.hidden_BTD, model.head, b).loss.backward()
        forward_and_backward = counted.get_total_flops()
    # Counted by PyTorch without attention's own products on CPU and with the class token and the two projections.
    assert forward_and_backward == pytest.approx(model.flops_per_token(T) * B * T, rel=0.25)
    a = model.architecture
    of_text = 12 * a.layers * a.heads * a.head_size * T
    assert model.flops_per_token(T) - model.causal_flops_per_token(T) == pytest.approx(of_text / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": 0}, "queries must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"text_layers": 0}, "text_layers must be positive"),
        ({"heads": 5}, "heads 5 does not divide hidden_size 24"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        coca(**arguments)


def test_what_does_not_fit_is_refused():
    model, b = coca(), batch()
    with pytest.raises(ConfigError, match="there are none"):
        model(b.tokens_BT)
    with pytest.raises(ConfigError, match="takes 3 x 8 x 8"):
        model(b.tokens_BT, images_BCHW=b.images_BCHW[:, :1])
    with pytest.raises(ConfigError, match="at most 6 tokens, not 7"):
        model(torch.zeros(1, 7, dtype=torch.int64), images_BCHW=b.images_BCHW[:1])
    with pytest.raises(ConfigError, match=r"only model\.coca gives"):
        CoCaLoss(One())(torch.zeros(1, 2, 3), model.head, b)
    with pytest.raises(ConfigError, match=r"CoCaOutput.*\n.*loss\.coca for model\.coca"):
        CrossEntropy()(output_of(model, b), model.head, b)
    with pytest.raises(ConfigError, match="zero or more"):
        CoCaLoss(One(), contrastive_weight=-1.0)
