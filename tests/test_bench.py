"""The benches' own arithmetic: what a run took, whose turn it is, medians, and the corpus and folders they run on."""

from __future__ import annotations

import importlib
import json
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benches read /proc")


@pytest.fixture
def bench(root, monkeypatch):
    """Imports a module of tools/bench as its scripts do, and forgets it afterwards."""
    before = set(sys.modules)
    for folder in ("tools/bench/data", "tools/bench"):
        monkeypatch.syspath_prepend(str(root / folder))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(root / "tools") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint('done')"


def test_cpu_seconds_include_children(bench):
    turns = bench("turns")
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {BURN!r}], check=True)"
    usage = turns.run([python(BURN), python(nested)], cores=1, timeout=60)
    assert 0.6 <= usage.cpu < 2.0
    assert usage.wall >= 0.6
    assert usage.output == "done\ndone\n"


def test_cpu_seconds_include_what_nobody_waited_for(bench):
    turns = bench("turns")
    nested = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {BURN!r}])"
    usage = turns.run([python(nested)], cores=1, timeout=60)
    assert 0.3 <= usage.cpu < 1.5


def test_peak_memory_is_the_commands_not_ours(bench):
    turns = bench("turns")
    ballast = np.ones(300 << 17)  # 300 MiB that the command does not have
    usage = turns.run([python("import time; kept = b'x' * (64 << 20); time.sleep(0.5)")], cores=1, timeout=60)
    assert 64 << 20 <= usage.peak_rss < 200 << 20 < ballast.nbytes


def test_a_command_that_fails_or_hangs_is_an_error(bench):
    turns = bench("turns")
    with pytest.raises(turns.RunError, match="ended with 3: broken"):
        turns.run([python("import sys; sys.stderr.write('broken'); sys.exit(3)")], cores=1, timeout=60)
    began = time.monotonic()
    with pytest.raises(turns.RunError, match="took too long"):
        turns.run([python("import time; time.sleep(60)")], cores=1, timeout=0.5)
    assert time.monotonic() - began < 20


def test_a_memory_limit_holds(bench):
    turns = bench("turns")
    with pytest.raises(turns.RunError, match="MemoryError"):
        turns.run([python("b'x' * (1 << 30)")], cores=1, timeout=60, memory_limit=256 << 20)


def test_turns_rotate_and_drop_what_failed(bench):
    turns = bench("turns")
    calls = []

    def one(name, number):
        calls.append((number, name))
        return None if (name, number) == ("b", 1) else {"cpu": number}

    found = turns.in_turn(["a", "b", "c"], 3, one)
    assert calls == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "a"), (2, "c")]
    assert {name: len(entries) for name, entries in found.items()} == {"a": 3, "b": 1, "c": 3}


def test_medians_of_numbers_and_the_first_of_the_rest(bench):
    turns = bench("turns")
    rounds = [{"cpu": 3.0, "digest": "x"}, {"cpu": 1.0, "digest": "x"}, {"cpu": 2.0, "digest": "x"}]
    assert turns.medians(rounds) == {"cpu": 2.0, "digest": "x"}


def test_the_corpus_has_every_text_once(bench, tmp_path):
    corpus = bench("corpus")
    for name, content in {
        "a.py": b"one = 1\n", "b.txt": b"one = 1\n", "c.rst": b"two\n", "d.md": b"  \n", "e.py": b"\xff\xfe",
        "f.py": b"say('<|endoftext|>')\n", "g.bin": b"three\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    assert list(corpus.documents([tmp_path])) == ["one = 1\n", "two\n"]


def test_parts_of_a_corpus_are_the_corpus(bench, tmp_path):
    corpus = bench("corpus")
    lines = [json.dumps({"text": "x" * size}) for size in (1, 500, 3, 90, 1000, 2, 2)]
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(line + "\n" for line in lines))
    folder = corpus.parts(whole, tmp_path / "parts", 3)
    parts = sorted(folder.iterdir())
    assert len(parts) == 3
    assert "".join(part.read_text() for part in parts) == whole.read_text()


def test_the_formats_hold_the_same_tokens(bench, tmp_path):
    from modalities_data.packed import PackedFolder, verify

    token_folders = bench("token_folders")
    tokens = np.array(token_folders.make(tmp_path / "made", 50_000))
    assert len(tokens) == 50_000
    assert tokens[-1] == token_folders.END
    assert np.array_equal(np.fromfile(tmp_path / "made" / "datatrove" / "tokens.ds", "<u2"), tokens)
    assert np.array_equal(np.fromfile(tmp_path / "made" / "tokens.pbin", "<u2", 50_000, offset=12), tokens)
    verify(tmp_path / "made" / "packed")
    verify(tmp_path / "made" / "sharded")
    for name, shards in (("packed", 1), ("sharded", 16)):
        folder = PackedFolder(tmp_path / "made" / name)
        assert len(folder.manifest.shards) == shards
        assert np.array_equal(np.concatenate([folder.tokens(number) for number in range(shards)]), tokens)


def test_sparse_folders_open_and_take_no_disk(bench, tmp_path):
    from modalities_data.datasets import PackedDataset

    bench("token_folders").make_sparse(tmp_path, 2048 * 10**6 + 1, shards=10)
    assert len(PackedDataset(tmp_path / "packed", 2048)) == 10**6
    assert sum(512 * path.stat().st_blocks for path in tmp_path.rglob("*.bin")) < 1 << 20


def report_of(pack, **changed):
    entry = {"wall": 2.0, "cpu": 1.0, "peak_rss": 10**8, "token_bytes": 10**6, "token_digest": "d"}
    table = {
        "modalities (fastokens)": entry,
        "modalities (tokenizers)": {**entry, "cpu": 20.0},
        "plain encode_batch_fast": {**entry, "cpu": 22.0, "encode_cpu": 19.0},
        "datatrove": {**entry, "cpu": 30.0, **changed},
    }
    return pack.report({
        "table": table, "start_cpu": dict.fromkeys(table, 0.5), "vocab_size": 1000, "workers": 1, "rounds": 1,
        "corpus": {"text_bytes": 10**8, "documents": 10, "sha256": "s"}, "missing": {"other": "pip failed"},
        "command": "c", "commit": "c", "date": "d", "cpu": "c", "cores": 2, "load": 1.0, "versions": {},
    })  # fmt: skip


def test_the_report_has_ratios_per_cpu_second_and_names_what_differs(bench):
    pack = bench("pack")
    text = report_of(pack)
    assert "| datatrove | 50.0 | 3.33 | 0.02 | 30.00 | 0.50 | 3.39 | 100 | 30.0x | yes |" in text
    assert "took 19.00 CPU s (5.26 MB/CPU-s)" in text
    assert "Not measured: other: pip failed" in text
    assert "| 30.0x | NO |" in report_of(pack, token_digest="e")


def test_a_loader_is_compared_with_ours_beside_it_and_as_the_same_integers(bench):
    load = bench("load")
    ours = {"int64 batch": 900.0, "int32 batch": 1000.0, "int64 batch, with documents": 500.0,
            "tensors of its loader": 600.0}  # fmt: skip
    assert load.like("samples alone, int32", ours) == "int32 batch"
    assert load.like("samples alone, int64, with positions", ours) == "int64 batch, with documents"
    assert load.like("tensors of its loader", {"int64 batch": 1.0}) == "int64 batch"
    # In the second round everything takes twice as long: the ratios stay.
    slow = {way: rate / 2 for way, rate in ours.items()}
    pairs = {
        "a": [{load.OURS: ours, "a": {"int32 batch": 100.0}}, {load.OURS: slow, "a": {"int32 batch": 50.0}}],
        "b": [{load.OURS: ours, "b": {"tensors of its loader": 60.0, "int64 batch": 300.0}}],
    }
    found = load.compared(pairs)
    assert found["ratios"] == {"a": {"int32 batch": 10.0}, "b": {"tensors of its loader": 10.0, "int64 batch": 3.0}}
    assert found["rates"]["a"] == {"int32 batch": 75.0} and found["rates"][load.OURS] == ours
    opening = {"import": 0.1, "open": 0.05, "seek": 0.01, "peak_rss": 4 * 10**7}
    told = {
        **found, "sequence_length": 2048, "tokens": 10**6, "rounds": 2, "missing": {"c": "pip failed"},
        "opening": {load.OURS: {"1e+09 in 10 shards": opening}, "a": {"1e+09": {"failed": "no memory"}}},
        "host": {"memory_bandwidth": 1e9, "read": {}, "index": {}, "best_fit": None},
        "command": "c", "commit": "c", "date": "d", "cpu": "c", "cores": 2, "load": 1.0, "versions": {},
    }  # fmt: skip
    text = load.report(told)
    assert "| b | int64 batch | 0.3 | 3,333.33 | int64 batch | 3.0x |" in text
    assert "Nearest to us is b with int64 batch: ours is 3.0 times as fast." in text
    assert "| modalities-data | 1e+09 in 10 shards | 0.100 | 0.050 | 0.010 | 40 |" in text
    assert "failed: no memory" in text and "Not measured: c: pip failed" in text
    assert "Nearest" not in load.report({**told, "ratios": {}})
