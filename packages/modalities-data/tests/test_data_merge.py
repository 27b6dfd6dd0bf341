"""Parts of a job, merged folders, Ray tasks and re-checked documents."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import msgspec
import numpy as np
import pytest

from modalities_core.errors import ConfigError, DataError
from modalities_data.lorem import lorem_document
from modalities_data.manifest import write_manifest
from modalities_data.packed import PackedFolder, verify
from modalities_data.prepare import merge as merge_module
from modalities_data.prepare.merge import merge
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer
from modalities_data.tokenizers.engines import TokenizersEngine
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, write_jsonl) -> Path:
    """Two files: a range without documents, rejected lines, and a file that goes on over several parts."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", [lorem_document(1, number) for number in range(40)])
    (folder / "b.jsonl").write_text(
        '{"text": ""}\n' * 400
        + "{broken\n"
        + "".join(json.dumps({"text": lorem_document(2, n)}) + "\n" for n in range(150))
    )
    return folder


def pack_it(corpus: Path, output: Path, **options):
    return pack(corpus, output, BytesTokenizer(), workers=1, on_error="skip", range_bytes=4000, **options)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "out"
    pack_it(corpus, output)
    assert "00000.bin" in contents(output) and len(contents(output)) > 30
    return contents(output)


@pytest.mark.parametrize("count", [1, 3, 7, 60])
def test_parts_in_any_order_merge_to_what_a_single_run_writes(corpus, whole, tmp_path, count) -> None:
    parts = [tmp_path / f"part-{number}" for number in range(1, count + 1)]
    for number, part in enumerate(parts, 1):
        made = pack_it(corpus, part, part=(number, count)).manifest
        assert made.options["part"]["number"] == number
        assert all((part / name).read_bytes() == whole[name] for name in contents(part) if name.endswith(".bin"))
    report = merge(parts[::-1], tmp_path / "merged")
    assert contents(tmp_path / "merged") == whole
    assert report.copied == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["merged", *(part.name for part in parts)])


def test_parts_that_do_not_make_a_whole_are_refused(corpus, tmp_path, write_jsonl) -> None:
    for number in (1, 2, 3):
        pack_it(corpus, tmp_path / str(number), part=(number, 3))
    pack_it(corpus, tmp_path / "half", part=(1, 2))
    pack_it(corpus, tmp_path / "all")
    other = write_jsonl(tmp_path / "x.jsonl", ["another job"])
    pack(other, tmp_path / "other", BytesTokenizer(), workers=1, part=(2, 3))
    for names, message in (
        ("13", "of 3 parts, 2 is missing"),
        (("1", "half"), "parts overlap: .*1 is 1/3, .*half is 1/2"),
        (("1", "other", "3"), "parts of different jobs"),
        (("1", "all"), "parts of different jobs, or parts and whole folders"),
    ):
        with pytest.raises(DataError, match=message):
            merge([tmp_path / name for name in names], tmp_path / "out")
    with pytest.raises(ConfigError, match="given twice"):
        merge([tmp_path / "1", tmp_path / "1"], tmp_path / "out")
    with pytest.raises(ConfigError, match="no folder"):
        merge([], tmp_path / "out")
    for part in ((0, 3), (4, 3)):
        with pytest.raises(ConfigError, match="does not exist"):
            pack_it(corpus, tmp_path / "out", part=part)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("links", [True, False])
def test_merged_folders_have_every_document_of_each(tmp_path, write_jsonl, monkeypatch, links) -> None:
    texts = [[lorem_document(seed, number) for number in range(20)] for seed in range(3)]
    folders = []
    for seed in range(3):
        source = write_jsonl(tmp_path / f"{seed}.jsonl", texts[seed])
        folders.append(tmp_path / f"packed-{seed}")
        pack(source, folders[-1], BytesTokenizer(), workers=1, range_bytes=2000)
    if not links:

        def no_links(*names: object) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(merge_module.os, "link", no_links)
    report = merge(folders, tmp_path / "out")
    opened = PackedFolder(tmp_path / "out")
    found = [BytesTokenizer().decode(opened.document(n).tolist()) for n in range(opened.manifest.documents)]
    assert found == [text for part in texts for text in part]
    assert verify(tmp_path / "out").accounting.written == 60
    names = [shard.name for shard in report.manifest.shards]
    assert names == [f"{number:05d}" for number in range(len(names))]
    same = (tmp_path / "out" / "00000.bin").samefile(folders[0] / "00000.bin")
    assert (same, report.copied > 0) == (links, not links)
    assert [Path(entry.file).name for entry in report.manifest.inputs] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    with pytest.raises(DataError, match="exists already"):
        merge(folders, tmp_path / "out")
    merge(folders[1:], tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out").documents == 40
    assert verify(folders[0]).documents == 20


def test_appending_leaves_open_readers_what_they_had(tmp_path, write_jsonl) -> None:
    for name in ("a", "b"):
        source = write_jsonl(tmp_path / f"{name}.jsonl", [lorem_document(ord(name), number) for number in range(9)])
        pack(source, tmp_path / name, BytesTokenizer(), workers=1)
    before = PackedFolder(tmp_path / "a")
    first = before.document(0).tolist()
    with pytest.raises(DataError, match="exists already"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "a")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "a", overwrite=True)
    after = verify(tmp_path / "a")
    assert (after.documents, len(after.inputs)) == (18, 2) and after.fingerprint != before.manifest.fingerprint
    assert before.document(0).tolist() == first and len(before.tokens(0)) == before.manifest.tokens
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "a.jsonl", "b.jsonl"}


def test_a_killed_merge_is_taken_up_without_leftovers(tmp_path, lorem_file, tokenizer_file, monkeypatch) -> None:
    pack(lorem_file, tmp_path / "a", HuggingFaceTokenizer(tokenizer_file), workers=1, range_bytes=50_000)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merge_module, "write_manifest", killed)
        merge([tmp_path / "a"], tmp_path / "out")
    partial = tmp_path / ".out.partial"
    assert partial.is_dir() and not (tmp_path / "out").exists()
    (partial / ".manifest.json.1.tmp").touch()
    merge([tmp_path / "a"], tmp_path / "out")
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "a").keys()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert not partial.exists() and verify(tmp_path / "out").documents == 400


def test_a_folder_of_an_unknown_tokenizer_is_refused(tmp_path, lorem_file) -> None:
    pack(lorem_file, tmp_path / "a", BytesTokenizer(), workers=1)
    made = pack(lorem_file, tmp_path / "b", BytesTokenizer(), workers=1).manifest
    unknown = msgspec.structs.replace(made.tokenizer, fingerprint="")
    for name in ("a", "b"):
        write_manifest(tmp_path / name, msgspec.structs.replace(made, tokenizer=unknown))
    with pytest.raises(DataError, match="does not say which tokenizer made it"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_the_jobs_of_the_readme(command, tmp_path, monkeypatch, write_jsonl, tokenizer_file) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "README.md").read_text().split("## Inputs\n")[1].split("\n## ")[0]
    (tmp_path / "texts").mkdir()
    for name in "ab":
        source = write_jsonl(tmp_path / f"{name}.jsonl", [lorem_document(ord(name), number) for number in range(50)])
        (tmp_path / "texts" / f"{name}.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    parquet.write_table(
        pytest.importorskip("pyarrow").table({"text": [lorem_document(9, number) for number in range(30)]}),
        "more.parquet",
    )
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 5
    for line in lines:
        done = command(*shlex.split(line)[1:], "--json")
        assert done.returncode == 0, done.stderr
    assert verify(Path("corpus")).documents == 130


def test_folders_of_different_tokenizers_are_refused_with_both_fingerprints(
    lorem_file, tokenizer_file, tmp_path
) -> None:
    pack(lorem_file, tmp_path / "bytes", BytesTokenizer(), workers=1)
    made = pack(lorem_file, tmp_path / "learned", HuggingFaceTokenizer(tokenizer_file), workers=1).manifest
    with pytest.raises(DataError) as caught:
        merge([tmp_path / "bytes", tmp_path / "learned"], tmp_path / "out")
    assert "bytes-1" in str(caught.value) and made.tokenizer.fingerprint in str(caught.value)
    assert "vocabulary 257" in str(caught.value) and "vocabulary 600" in str(caught.value)


def test_the_commands(command, corpus, whole, tmp_path) -> None:
    for number in (1, 2):
        done = command(
            "pack", corpus, tmp_path / f"p{number}", "--tokenizer", "bytes", "--workers", 1, "--range-bytes", 4000,
            "--on-error", "skip", "--shard", f"{number}/2", "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    merged = command("merge", tmp_path / "p1", tmp_path / "p2", tmp_path / "out", "--json")
    summary = json.loads(merged.stdout.splitlines()[-1])
    assert contents(tmp_path / "out") == whole
    assert summary["fingerprint"] == PackedFolder(tmp_path / "out").manifest.fingerprint
    assert "no byte copied" in merged.stderr
    wrong = command("pack", corpus, tmp_path / "x", "--tokenizer", "bytes", "--shard", "0/2")
    assert wrong.returncode == 2 and "0/2 is not I/N" in wrong.stderr


@pytest.mark.slow
def test_ray_tasks_write_the_same_bytes(script, corpus, whole, tmp_path) -> None:
    pytest.importorskip("ray")
    code = (
        "import sys; from pathlib import Path\n"
        "from modalities_core.errors import DataError\n"
        "from modalities_data.prepare.pack import pack\n"
        "from modalities_data.tokenizers.bytes import BytesTokenizer\n"
        "options = dict(workers=2, range_bytes=4000, run_on='ray')\n"
        "try:\n"
        "    pack(Path(sys.argv[1]), Path(sys.argv[2]), BytesTokenizer(), **options)\n"
        "except DataError as error:\n"
        "    print(error.message)\n"
        "report = pack(Path(sys.argv[1]), Path(sys.argv[2]), BytesTokenizer(), on_error='skip', **options)\n"
        "print(report.tokens_written == report.manifest.tokens)\n"
    )
    done = script(code, corpus, tmp_path / "out", timeout=240, RAY_USAGE_STATS_ENABLED="0")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert "b.jsonl:401: JSON is malformed" in first and last == "True"
    assert contents(tmp_path / "out") == whole


class Wrong(HuggingFaceTokenizer):
    """Gives a wrong id in documents that say so."""

    def encode_flat(self, documents):
        ids, offsets = super().encode_flat(documents)
        ids = np.array(ids)
        for number, document in enumerate(documents):
            if "wrong" in document:
                ids[offsets[number + 1] - 1] += 1
        return ids, offsets


@pytest.mark.parametrize(("every", "found"), [(1, True), (10, True), (7, False)])
def test_a_document_with_other_ids_is_named(tmp_path, write_jsonl, tokenizer_file, every, found) -> None:
    texts = [f"document {number}" for number in range(100)]
    texts[31] += " wrong"  # the thirtieth of those that are not empty, from zero
    texts[3] = ""
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    source.write_text("\n" + source.read_text())
    tokenizer = Wrong(tokenizer_file, engine="tokenizers")
    if found:
        with pytest.raises(DataError, match=r"x\.jsonl:33: tokenizers gives \[\d+\] at token \d+, tokenizers gives"):
            pack(source, tmp_path / "out", tokenizer, workers=1, verify_every=every)
        assert not (tmp_path / "out").exists()
    else:
        made = pack(source, tmp_path / "out", tokenizer, workers=1, verify_every=every).manifest
        assert made.options["verify_every"] == 7


def test_what_is_checked_again_is_every_so_manieth_document(tmp_path, lorem_file, tokenizer_file, monkeypatch) -> None:
    checked = []
    encode = TokenizersEngine.encode_flat

    def counted(self, documents):
        checked.extend(documents)
        return encode(self, documents)

    tokenizer = HuggingFaceTokenizer(tokenizer_file, engine="fastokens")
    monkeypatch.setattr(TokenizersEngine, "encode_flat", counted)
    pack(lorem_file, tmp_path / "out", tokenizer, workers=1, verify_every=9)
    texts = [json.loads(line)["text"] for line in lorem_file.read_text().splitlines()]
    assert checked == texts[::9]


def test_a_tokenizer_without_a_reference_cannot_be_checked(tmp_path, lorem_file) -> None:
    with pytest.raises(ConfigError, match="does not know BytesTokenizer"):
        pack(lorem_file, tmp_path / "out", BytesTokenizer(), workers=1, verify_every=2)
    with pytest.raises(ConfigError, match="verify_every is at least 1"):
        pack(lorem_file, tmp_path / "out", BytesTokenizer(), workers=1, verify_every=0)
