"""Many sources: files, patterns, folders and packed files are one result, in whatever order they are named."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from buleyean_rl.cli import main
from buleyean_rl.data.importers import import_records
from buleyean_rl.data.importers.expand import expand_sources
from buleyean_rl.data.records import make_record, read_records
from buleyean_rl.errors import RecordError

SAME = {"prompt": "same", "chosen": "Yes.", "rejected": "No."}


def pair(name: str) -> dict[str, str]:
    return {"prompt": name, "chosen": "Yes.", "rejected": "No."}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def zstd(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as file:
        file.write(content)
    return packed.getvalue().to_pybytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of every kind, each with a prompt of its own and one that all of them have."""
    inner = tmp_path / "data" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "a.jsonl").write_bytes(lines(pair("a"), SAME))
    (inner / "b.jsonl.gz").write_bytes(gzip.compress(lines(pair("b"), SAME)))
    (inner / "c.jsonl.zst").write_bytes(zstd(lines(pair("c"), SAME)))
    (inner / "d.csv").write_text("prompt,chosen,rejected\nd,Yes.,No.\nsame,Yes.,No.\n")
    pyarrow.parquet.write_table(pa.Table.from_pylist([pair("e"), SAME]), inner / "e.parquet")
    saved = inner / "f"
    saved.mkdir()
    with pa.ipc.new_stream(saved / "data-00000-of-00001.arrow", pa.schema(dict.fromkeys(SAME, pa.string()))) as writer:
        writer.write_table(pa.Table.from_pylist([pair("f"), SAME]))
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (inner / "g.jsonl").write_bytes(lines({"prompt": "same", "completion": "No.", "label": False}))
    (inner / "README.md").write_text("Not data.")
    (inner / ".hidden.jsonl").write_text("{")
    return tmp_path / "data"


def test_a_folder_is_all_of_its_files(folder: Path, tmp_path: Path) -> None:
    report = import_records(str(folder), tmp_path / "r.jsonl")
    assert (report.sources, report.rows, report.records, report.format) == (7, 13, 7, "kto, pairs")
    records = {record.prompt: record for record in read_records(tmp_path / "r.jsonl")}
    assert sorted(map(str, records)) == [*"abcdef", "same"]
    assert records["same"] == make_record("same", ["No."], [7], 7)
    assert "13 rows of 7 files -> 7 records" in report.lines()[0]


def test_the_order_of_the_sources_does_not_matter(folder: Path, tmp_path: Path) -> None:
    names = [str(folder / "inner"), str(folder / "*.jsonl"), str(folder / "inner" / "d.csv")]  # one is there twice
    results = set()
    for number, order in enumerate(itertools.permutations(names)):
        import_records(list(order), tmp_path / f"{number}.jsonl")
        results.add((tmp_path / f"{number}.jsonl").read_bytes())
    import_records(str(folder), tmp_path / "all.jsonl")
    assert results == {(tmp_path / "all.jsonl").read_bytes()}


def test_accepted_answers_are_kept_by_the_format_of_their_own_file(tmp_path: Path) -> None:
    liked = {"prompt": "p", "rejected_responses": ["Fine."], "rejection_counts": [0], "total_rounds": 1}
    (tmp_path / "a.jsonl").write_bytes(lines(liked))  # records keep what was accepted
    (tmp_path / "b.jsonl").write_bytes(lines(pair("p"), pair("q")))  # pairs do not
    report = import_records([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tmp_path / "r.jsonl")
    assert list(read_records(tmp_path / "r.jsonl")) == [
        make_record("p", ["Fine.", "No."], [0, 1], 1),
        make_record("q", ["No."]),
    ]
    assert (report.accepted, report.chosen_discarded) == (1, 2)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("bad.jsonl.gz", gzip.compress(lines(*map(pair, "xyz")) * 9, mtime=0)[:-9], "damaged .gz file"),
        ("bad.jsonl.zst", zstd(lines(*map(pair, "xyz")) * 9)[:-9], "damaged .zst file: Truncated"),
        ("bad.parquet", b"PAR1 no more", "no Parquet or Arrow file"),
        ("bad.jsonl", b'{"x": 1}\n', "no known format"),
    ],
    ids=["gz", "zst", "parquet", "jsonl"],
)
def test_a_bad_file_is_named_and_may_be_skipped(
    tmp_path: Path, name: str, content: bytes, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(pair("a")))
    (tmp_path / "c.jsonl").write_bytes(lines(pair("c")))
    (tmp_path / name).write_bytes(content)
    words = ["data", "import", str(tmp_path / "*.*"), "-o", str(tmp_path / "r")]
    assert main(words) == 1
    assert f"{tmp_path / name}: " in (err := capsys.readouterr().err)
    assert problem in err
    assert not (tmp_path / "r").exists()
    assert main([*words, "--skip-bad", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["sources"], report["sources_skipped"]) == (3, 1)
    assert {"a", "c"} <= {record.prompt for record in read_records(tmp_path / "r")}
    assert "files skipped, or what is left of them: 1" in err
    assert problem in report["errors"][0]


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="matches no file"):
        expand_sources([str(tmp_path / "*.jsonl")])


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").touch()
    for name in ("b", "c"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    assert expand_sources([str(tmp_path)]) == [str(tmp_path / "a" / "x.jsonl")]
