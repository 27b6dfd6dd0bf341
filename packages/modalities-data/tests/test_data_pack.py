"""Packing: the same bytes whatever the workers, kills and reruns; nothing lost, nothing half done."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from modalities_core.errors import ConfigError, DataError
from modalities_data.lorem import lorem_document
from modalities_data.manifest import Accounting
from modalities_data.packed import PackedFolder, verify
from modalities_data.prepare import pack as pack_module
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(lorem_file, tmp_path_factory) -> dict[str, bytes]:
    """The output of the uninterrupted job in one process."""
    output = tmp_path_factory.mktemp("expected") / "corpus"
    pack(lorem_file, output, BytesTokenizer(), workers=1, range_bytes=20_000)
    return contents(output)


def test_the_number_of_workers_does_not_change_a_byte(lorem_file, tokenizer_file, tmp_path) -> None:
    outputs = []
    for workers in (1, 2):
        output = tmp_path / str(workers)
        done: list[tuple[int, int, int]] = []
        report = pack(
            lorem_file, output, HuggingFaceTokenizer(tokenizer_file), workers=workers, range_bytes=20_000,
            on_progress=lambda *now, done=done: done.append(now),
        )  # fmt: skip
        assert report.workers == workers and report.shards_reused == 0
        size = lorem_file.stat().st_size
        assert done[-1] == (size, size, report.manifest.tokens) == (report.bytes_read, size, report.tokens_written)
        assert done == sorted(done)
        outputs.append(contents(output))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 20


def test_ranges_do_not_change_the_tokens(lorem_file, tmp_path, expected) -> None:
    pack(lorem_file, tmp_path / "one", BytesTokenizer(), workers=1)
    joined = b"".join(expected[name] for name in sorted(expected) if name.endswith(".bin"))
    assert (tmp_path / "one" / "00000.bin").read_bytes() == joined


def damaged_file(path: Path) -> Path:
    """1,000 documents: one empty, three bad lines, blank lines and a file that ends without a newline."""
    lines = [json.dumps({"text": f"document {number}"}) for number in range(1000)]
    lines[100] = '{"text": ""}'
    lines[250] = "{broken"
    lines[500] = '{"txt": "no key"}'
    lines[998] = '{"text": 1}'
    lines[700] += "\n\n  "
    path.write_text("\n".join(lines))
    return path


def test_one_empty_document_costs_no_other(tmp_path, write_jsonl) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", [f"document {n}" if n != 500 else "" for n in range(1000)])
    made = pack(source, tmp_path / "out", BytesTokenizer(), workers=1).manifest
    assert made.accounting == Accounting(1000, 999, {"empty": 1})
    assert made.documents == 999


def test_a_bad_line_fails_with_its_place_and_leaves_no_output(tmp_path) -> None:
    source = damaged_file(tmp_path / "x.jsonl")
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"x\.jsonl:251: JSON is malformed"):
            pack(source, tmp_path / "out", BytesTokenizer(), workers=workers, range_bytes=20_000)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", [5_000, 64 << 20])
def test_skipped_lines_are_counted_and_listed(tmp_path, target) -> None:
    source = damaged_file(tmp_path / "x.jsonl")
    made = pack(source, tmp_path / "out", BytesTokenizer(), workers=1, on_error="skip", range_bytes=target).manifest
    assert made.accounting == Accounting(1000, 996, {"empty": 1}, 3, 2)
    opened = PackedFolder(tmp_path / "out")
    texts = [BytesTokenizer().decode(opened.document(number).tolist()) for number in range(996)]
    assert texts == [f"document {number}" for number in range(1000) if number not in (100, 250, 500, 998)]
    lists = sorted((tmp_path / "out").glob("*.rejected.jsonl"))
    rejected = [json.loads(line) for path in lists for line in path.read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == [251, 501, 1001]
    content = source.read_bytes()
    for entry, start in zip(rejected, (b"{broken", b'{"txt"', b'{"text": 1}'), strict=True):
        assert content[entry["offset"] :].startswith(start)
        assert entry["file"] == str(source) and entry["reason"]


def test_a_range_without_documents_leaves_no_empty_shard(tmp_path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "a"}\n' + '{"text": ""}\n' * 100 + '{"text": "b"}\n')
    made = pack(source, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=300).manifest
    assert made.accounting == Accounting(102, 2, {"empty": 100})
    assert all(shard.bytes for shard in made.shards) and len(made.shards) == 2
    verify(tmp_path / "out")


def test_documents_a_normalizer_empties_are_a_rule_of_their_own(tmp_path, write_jsonl) -> None:
    class Stripping(BytesTokenizer):
        def encode_flat(self, documents):
            return super().encode_flat([document.strip() for document in documents])

    source = write_jsonl(tmp_path / "x.jsonl", ["a", "  ", "b", " ", "", "c", " "])
    made = pack(source, tmp_path / "out", Stripping(), workers=1).manifest
    assert made.accounting == Accounting(7, 3, {"empty": 1, "no_tokens": 3})
    assert (tmp_path / "out" / "00000.idx").stat().st_size == 34 + 20 * 3 + 8
    assert PackedFolder(tmp_path / "out").tokens(0).tolist() == [97, 256, 98, 256, 99, 256]
    assert made.text_bytes == 3


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_nothing_to_pack_is_an_error(tmp_path, content) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="is empty|no documents to write"):
        pack(tmp_path / "x.jsonl", tmp_path / "out", BytesTokenizer(), workers=1)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_replaced_only_when_asked_and_only_a_packed_folder(lorem_file, tmp_path, expected) -> None:
    output = tmp_path / "out"
    (tmp_path / "small.jsonl").write_text('{"text": "small"}\n')
    pack(tmp_path / "small.jsonl", output, BytesTokenizer(), workers=1)
    before = contents(output)
    with pytest.raises(DataError, match="exists already\n.*--overwrite"):
        pack(lorem_file, output, BytesTokenizer(), workers=1)
    assert contents(output) == before
    pack(lorem_file, output, BytesTokenizer(), workers=1, range_bytes=20_000, overwrite=True)
    assert contents(output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small.jsonl"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").touch()
    with pytest.raises(DataError, match="no packed folder, so --overwrite does not"):
        pack(lorem_file, tmp_path / "home", BytesTokenizer(), overwrite=True)
    assert (tmp_path / "home" / "precious").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"workers": 0}, "workers"), ({"on_error": "ignore"}, "on_error"), ({"range_bytes": 0}, "range_bytes")],
)
def test_arguments_out_of_range(lorem_file, tmp_path, arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(lorem_file, tmp_path / "out", BytesTokenizer(), **arguments)


class Killed(Exception):
    """Stands for any end of the process."""


@pytest.mark.parametrize("after", [1, 4, 9])
def test_an_interrupted_job_is_taken_up(lorem_file, tmp_path, expected, after) -> None:
    calls = 0

    def interrupt(*now: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Killed

    with pytest.raises(Killed):
        pack(lorem_file, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=20_000, on_progress=interrupt)
    assert not (tmp_path / "out").exists()
    report = pack(lorem_file, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=20_000)
    assert report.shards_reused == after - 1
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", ["input", "options", "a cut shard"])
def test_parts_of_another_job_are_not_taken_up(lorem_file, tmp_path, expected, change, monkeypatch) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "old"}\n' + lorem_file.read_text())

    def stop(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pack_module, "_commit", stop)
        size = 20_000 if change != "options" else 30_000
        first = source if change == "input" else lorem_file
        pack(first, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=size)
    if change == "a cut shard":
        (tmp_path / ".out.partial" / "00003.bin").write_bytes(b"")
    report = pack(lorem_file, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=20_000)
    assert report.shards_reused == (len(report.manifest.shards) - 1 if change == "a cut shard" else 0)
    assert contents(tmp_path / "out") == expected


PACK = """
import os, signal, sys
from pathlib import Path
from multiprocessing import active_children
from modalities_core.errors import ModalitiesError
from modalities_data.prepare.pack import pack
from modalities_data.tokenizers.bytes import BytesTokenizer

def on_progress(done, total, tokens):
    if done >= total * float(sys.argv[4]):
        children = [child.pid for child in active_children()]
        print(*children, flush=True)
        victims = children if sys.argv[5] == "worker" else [os.getpid()]
        # A killed worker's last report may still come when no worker is left.
        for victim in victims[:1]:
            os.kill(victim, signal.SIGKILL)

if __name__ == "__main__":
    try:
        pack(Path(sys.argv[1]), Path(sys.argv[2]), BytesTokenizer(), workers=int(sys.argv[3]), range_bytes=20_000,
             on_progress=on_progress)
    except ModalitiesError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("workers", "at"), [(1, 0.05), (1, 0.99), (2, 0.1), (2, 0.6)])
def test_kill_9_anywhere_then_rerun_gives_the_same_bytes(script, lorem_file, tmp_path, expected, workers, at) -> None:
    done = script(PACK, lorem_file, tmp_path / "out", workers, at, "parent", timeout=60)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    wait_until_gone([int(pid) for pid in done.stdout.split()])
    pack(lorem_file, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=20_000)
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def wait_until_gone(pids: list[int]) -> None:
    """No worker outlives its parent for long."""
    deadline = time.monotonic() + 20
    for pid in pids:
        while time.monotonic() < deadline:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            status = Path(f"/proc/{pid}/stat")
            if status.exists() and ") Z " in status.read_text():  # ended, and nobody has asked how
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"worker {pid} outlived its parent")


def test_a_killed_worker_ends_the_job_at_once(script, lorem_file, tmp_path, expected) -> None:
    started = time.monotonic()
    done = script(PACK, lorem_file, tmp_path / "out", 2, 0.05, "worker", timeout=60)
    assert done.returncode == 5, done.stderr
    assert "a packing worker was killed" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - started < 30
    assert not (tmp_path / "out").exists()
    pack(lorem_file, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=20_000)
    assert contents(tmp_path / "out") == expected


FULL = """
import resource, sys
from modalities_data.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = ["modalities-data", *sys.argv[1:]]
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_no_space_left_is_a_resource_error(script, lorem_file, tmp_path, workers) -> None:
    """A limit on file sizes stands for a full disk."""
    size = 64 << 20 if workers == 1 else 100_000
    done = script(
        FULL, "pack", lorem_file, tmp_path / "out", "--tokenizer", "bytes", "--workers", workers, "--range-bytes", size
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("error: no space left to write") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_jobs_do_not_share_a_folder(lorem_file, tmp_path) -> None:
    seen = []

    def second(*now: int) -> None:
        if not seen:
            with pytest.raises(DataError, match="another process is packing") as caught:
                pack(lorem_file, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=20_000)
            seen.append(caught)

    pack(lorem_file, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=20_000, on_progress=second)
    assert seen


def test_one_document_larger_than_a_range(tmp_path, write_jsonl) -> None:
    long = "".join(lorem_document(0, number) for number in range(200))
    source = write_jsonl(tmp_path / "x.jsonl", ["a", long, "b", long, "c"])
    made = pack(source, tmp_path / "out", BytesTokenizer(), workers=1, range_bytes=1000).manifest
    assert made.accounting.written == 5 and len(made.shards) == 3
    assert [shard.documents for shard in made.shards] == [2, 2, 1]
