"""Folders of images and captions: what is written is what is read, whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modalities_core.errors import ConfigError, DataError
from modalities_core.interfaces import Dataset
from modalities_data.datasets import ImageTextDataset, MixtureDataset, PartDataset
from modalities_data.image_text import open_images, read_captions, read_manifest, write_image_text
from modalities_data.prepare.image_text import image_text, read_image
from modalities_data.tokenizers.bytes import BytesTokenizer

TEXTS = ["a cat", ["zwei Hunde", "two dogs"], "", "naïve 🙂"]
CAPTIONS = ["a cat", "zwei Hunde", "two dogs", "", "naïve 🙂"]
IMAGE_OF = [0, 1, 1, 2, 3]


def pictures(count=4, height=3, width=5):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    write_image_text(tmp_path / "pairs", zip(pictures(), TEXTS, strict=True))
    return tmp_path / "pairs"


def test_the_folder_is_what_it_says(folder):
    manifest = read_manifest(folder)
    assert (manifest.images, manifest.captions, manifest.shape) == (4, 5, (3, 5, 3))
    assert np.array_equal(open_images(folder, manifest), pictures())
    assert np.array_equal(np.fromfile(folder / "images.bin", np.uint8), pictures().ravel())
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"image": i, "text": t} for i, t in zip(IMAGE_OF, CAPTIONS, strict=True)]
    assert [caption.text for caption in read_captions(folder, manifest)] == CAPTIONS


def test_a_sample_is_a_caption_between_two_ends_and_its_image(folder):
    dataset = ImageTextDataset(folder, BytesTokenizer(), 12)
    assert isinstance(dataset, Dataset) and dataset.image_shape == (3, 5, 3) and dataset.largest_id == 256
    order = np.array([4, 0, 3, 2, 1, 0])
    samples = dataset.gather(order)
    for row, number in enumerate(order.tolist()):
        ids = list(CAPTIONS[number].encode())
        padding = 11 - len(ids)
        assert samples.tokens[row].tolist() == [256, *ids, 256, *[256] * padding]
        assert samples.weights[row].tolist() == [1.0] * (len(ids) + 1) + [0.0] * padding
        assert samples.segments[row].tolist() == [0] * (len(ids) + 1) + [1] * padding
        assert np.array_equal(samples.images[row], pictures()[IMAGE_OF[number]])
    assert dataset.gather(np.array([], np.int64)).tokens.shape == (0, 13)
    with pytest.raises(IndexError):
        dataset.gather(np.array([5]))


def test_long_captions_are_refused_or_cut_and_ended(folder):
    with pytest.raises(DataError, match="longest caption has 11 tokens") as caught:
        ImageTextDataset(folder, BytesTokenizer(), 11)
    assert "sequence_length to 12" in str(caught.value)
    samples = ImageTextDataset(folder, BytesTokenizer(), 5, long_captions="cut").gather(np.array([1, 3]))
    assert samples.tokens.tolist() == [[256, *b"zwei", 256], [256] * 6]
    assert samples.weights.tolist() == [[1.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]]
    with pytest.raises(ConfigError, match="refuse or cut"):
        ImageTextDataset(folder, BytesTokenizer(), 5, long_captions="drop")  # type: ignore[arg-type]


def test_fingerprints_tell_data_apart(folder, tmp_path):
    first = ImageTextDataset(folder, BytesTokenizer(), 12)
    assert first.fingerprint == ImageTextDataset(folder, BytesTokenizer(), 12).fingerprint
    write_image_text(tmp_path / "other", zip(pictures()[::-1], TEXTS, strict=True))
    others = [
        ImageTextDataset(tmp_path / "other", BytesTokenizer(), 12),
        ImageTextDataset(folder, BytesTokenizer(), 13),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_batches_bring_the_images_in_the_order_of_models(folder):
    torch = pytest.importorskip("torch")
    from modalities_data.loading.batches import HeldOutBatches, ShuffledBatches

    class Place:
        """A world's place, as batches ask for it."""

        rank = data_rank = 0
        size = data_size = 1
        device = torch.device("cpu")

    dataset = ImageTextDataset(folder, BytesTokenizer(), 12)
    batches = ShuffledBatches(dataset, Place(), samples_per_step=4, micro_batch_size=2)
    assert batches.image_shape == (3, 5, 3)
    batch = batches.micro_batches(0)[0].to("cpu")
    assert batch.images_BCHW.shape == (2, 3, 3, 5) and batch.images_BCHW.dtype == torch.uint8
    assert batch.images_BCHW.is_contiguous()
    held_out = list(HeldOutBatches(dataset, Place(), 3))
    assert [part.weights_BT.sum(1).gt(0).tolist() for part in held_out] == [[True] * 3, [True, True, False]]
    seen = torch.cat([part.images_BCHW for part in held_out])[:5].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(seen, pictures()[IMAGE_OF])


def test_parts_and_mixtures_keep_the_images(folder, tmp_path):
    dataset = ImageTextDataset(folder, BytesTokenizer(), 12)
    part = PartDataset(dataset, 0.4)
    assert part.image_shape == (3, 5, 3)
    assert np.array_equal(part.gather(np.arange(3)).images, pictures()[IMAGE_OF[2:]])
    mixture = MixtureDataset([dataset, part], [1, 1])
    source, rows = mixture.sources(np.arange(6))[0], mixture.gather(np.arange(6))
    assert set(source.tolist()) == {0, 1}
    for tokens, image in zip(rows.tokens, rows.images, strict=True):
        caption = bytes(tokens[tokens < 256].tolist()).decode()
        assert np.array_equal(image, pictures()[IMAGE_OF[CAPTIONS.index(caption)]])
    write_image_text(tmp_path / "small", [(pictures()[0][:1], "x")])
    with pytest.raises(ConfigError, match="another size"):
        MixtureDataset([dataset, ImageTextDataset(tmp_path / "small", BytesTokenizer(), 12)], [1, 1])


def test_what_cannot_be_written_leaves_nothing(folder, tmp_path):
    image = pictures()[0]
    wrong = {
        "shape": [(image, "a"), (image[:2], "b")],
        "float32": [(image.astype(np.float32), "a")],
        "has no caption": [(image, [])],
        "no image": [],
    }
    for message, pairs in wrong.items():
        with pytest.raises(DataError, match=message):
            write_image_text(tmp_path / "new", pairs)
    with pytest.raises(DataError, match="exists already"):
        write_image_text(folder, [(image, "a")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs"]
    write_image_text(folder, [(image, "a")], overwrite=True)
    assert read_manifest(folder).images == 1
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="does not replace"):
        write_image_text(tmp_path / "mine", [(image, "a")], overwrite=True)


def test_damage_is_found(folder):
    with (folder / "images.bin").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match="181 bytes, its manifest says 180"):
        ImageTextDataset(folder, BytesTokenizer(), 12)
    (folder / "images.bin").write_bytes(pictures()[::-1].tobytes())
    with pytest.raises(DataError, match=r"images\.bin was changed"):
        ImageTextDataset(folder, BytesTokenizer(), 12)
    (folder / "images.bin").write_bytes(pictures().tobytes())
    ImageTextDataset(folder, BytesTokenizer(), 12)
    (folder / "captions.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="was changed"):
        ImageTextDataset(folder, BytesTokenizer(), 12)
    (folder / "manifest.json").write_text('{"images": 0}')
    with pytest.raises(DataError, match="not the manifest"):
        read_manifest(folder)


def test_files_of_arrays_become_a_folder(tmp_path, command):
    source = tmp_path / "captions.jsonl"
    (tmp_path / "files").mkdir()
    grey = pictures()[..., 0]
    for number, pixels in enumerate(grey):
        np.save(tmp_path / "files" / f"{number}.npy", pixels)
    lines = [{"image": f"files/{n}.npy", "text": text} for n, text in enumerate(TEXTS)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command("image-text", source, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["captions"] == 5
    manifest = read_manifest(tmp_path / "out")
    assert np.array_equal(open_images(tmp_path / "out", manifest), np.repeat(grey[..., None], 3, -1))
    verified = command("verify", tmp_path / "out")
    assert verified.returncode == 0 and "4 images, 180 B, every checksum matches" in verified.stdout
    with (tmp_path / "out" / "images.bin").open("r+b") as stream:
        stream.write(b"!")
    assert command("verify", tmp_path / "out").returncode == 3
    again = command("image-text", source, tmp_path / "out")
    assert again.returncode == 3 and "exists already" in again.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"captions.jsonl:2: .*"),
        ('{"image": 3, "text": "a"}', "'image' is not the path"),
        ('{"image": "a.npy", "text": [1]}', "'text' is neither"),
        ('{"image": "missing.npy", "text": "a"}', "No such file"),
        ('{"image": "object.npy", "text": "a"}', "no array of pixels"),
        ('{"image": "float.npy", "text": "a"}', "uint8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    np.save(tmp_path / "a.npy", pictures()[0])
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "float.npy", np.zeros((2, 2)))
    (tmp_path / "captions.jsonl").write_text('{"image": "a.npy", "text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        image_text(tmp_path / "captions.jsonl", tmp_path / "out")


def test_pictures_are_scaled_to_their_middle_square(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = (200, 100, 50)
    pillow.fromarray(pixels).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", pixels)
    for name in ("a.png", "a.npy"):
        assert (read_image(tmp_path / name, size=4) == np.array([200, 100, 50])).all()
        assert read_image(tmp_path / name, size=4, channels=1).shape == (4, 4, 1)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="is no image"):
        read_image(tmp_path / "b.png")
