import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from depthprune import embedded
from depthprune.data import opening
from depthprune.data import text as text_module
from depthprune.data.opening import open_text, read_documents
from depthprune.data.text import ROLES, Document, RoleShares, TextSource, role_documents, role_of

WORDS = [f"document number {i} says something" for i in range(9)]


NAN = float("nan")


def texts(source: TextSource) -> list[str]:
    return [document.text for document in read_documents(source)]


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def webtext(tmp_path: Path) -> Path:
    """The layout of OpenWebText's converted parquet: one folder for the configuration, numbered shards."""
    folder = tmp_path / "openwebtext"
    (folder / "plain_text").mkdir(parents=True)
    for shard in range(3):
        table = pa.table({"text": WORDS[3 * shard : 3 * shard + 3]})
        pq.write_table(table, folder / "plain_text" / f"train-{shard:05}-of-00003.parquet", row_group_size=2)
    return folder


def test_folder_in_the_layout_of_openwebtext(webtext: Path) -> None:
    assert texts(TextSource(str(webtext))) == WORDS
    assert texts(TextSource(str(webtext), files="plain_text/train-0000[12]-*.parquet")) == WORDS[3:]
    assert texts(TextSource(str(webtext), files=["plain_text/train-00002-of-00003.parquet"])) == WORDS[6:]
    assert TextSource(str(webtext)).title == "openwebtext"
    origins = [document.origin for document in read_documents(TextSource(str(webtext)))]
    assert [(origin.file_index, origin.row) for origin in origins] == [(i // 3, i % 3) for i in range(9)]
    assert "train-00001-of-00003.parquet, row 2" in str(origins[5])


@pytest.mark.parametrize("start", [(0, 0), (0, 1), (1, 0), (1, 2), (1, 3), (2, 2), (2, 3), (3, 0)])
def test_reading_goes_on_from_any_position(webtext: Path, start: tuple[int, int]) -> None:
    text = open_text(TextSource(str(webtext)))
    assert [document.text for document in text.documents(*start)] == WORDS[3 * start[0] + start[1] :]


def test_positions_count_rows_across_tables_and_empty_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_ROWS_AT_ONCE", 3)
    rows = ["a", "", "b", " \n", "c", "d", "e", "", "f"]
    source = TextSource(str(write_lines(tmp_path / "x.jsonl", [{"text": row} for row in rows])))
    for start in range(len(rows) + 1):
        found = [(document.origin.row, document.text) for document in open_text(source).documents(0, start)]
        assert found == [(i, row) for i, row in enumerate(rows) if row.strip() and i >= start]


def test_json_lines_text_and_compressed_files(tmp_path: Path) -> None:
    rows: list[object] = [{"body": word, "title": i // 2} for i, word in enumerate(WORDS)]
    plain = write_lines(tmp_path / "some [1] rows.jsonl", rows)
    source = TextSource(str(plain), column="body", group_column="title")
    assert texts(source) == WORDS
    assert [document.group for document in read_documents(source)] == [str(i // 2) for i in range(9)]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert texts(TextSource(str(tmp_path / "x.jsonl.gz"), column="body")) == WORDS
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert texts(TextSource(str(tmp_path / "x.json"), column="body")) == WORDS
    (tmp_path / "x.txt").write_text("one\ntwo\n\nthree\n")
    assert texts(TextSource(str(tmp_path / "x.txt"))) == ["one", "two", "three"]
    assert TextSource(str(tmp_path / "x.jsonl.gz")).title == "x"
    assert TextSource("books/train.parquet").title == "books-train"


def test_embedded_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_lines(tmp_path / "t.jsonl", [{"text": word, "group": "g"} for word in WORDS])
    monkeypatch.setattr(opening, "TEXTS", {"tiny": None})
    monkeypatch.setattr(embedded, "text_file", lambda name: file)
    documents = list(read_documents(TextSource("tiny")))
    assert [document.text for document in documents] == WORDS
    assert {document.group for document in documents} == {"g"}
    assert open_text(TextSource("tiny", sample=1, samples=2)).source.sample == 1


def test_documents_with_the_same_words_share_a_group(tmp_path: Path) -> None:
    rows: list[object] = [{"text": "The  same\nwords"}, {"text": "the same WORDS "}, {"text": "other words"}]
    first, second, third = read_documents(TextSource(str(write_lines(tmp_path / "x.jsonl", rows))))
    assert first.group == second.group != third.group


def test_roles_are_disjoint_complete_and_stable() -> None:
    shares = RoleShares()
    roles = [role_of(f"group {i}", shares) for i in range(4000)]
    assert roles == [role_of(f"group {i}", shares) for i in range(4000)]
    for role, share in {"score": 0.2, "fit": 0.4, "tune": 0.15, "test": 0.25}.items():
        assert Counter(roles)[role] / 4000 == pytest.approx(share, abs=0.03)
    assert roles[:6] == ["tune", "score", "score", "fit", "tune", "fit"]  # on every machine
    assert {role_of(f"group {i}", RoleShares(0, 0, 0, 1)) for i in range(50)} == {"test"}


def test_a_group_is_never_on_two_sides(tmp_path: Path) -> None:
    rows: list[object] = [{"text": f"{i} text", "title": f"title {i % 40}"} for i in range(200)]
    text = open_text(TextSource(str(write_lines(tmp_path / "x.jsonl", rows)), group_column="title"))
    sides: dict[str, list[Document]] = {role: list(role_documents(text, role, RoleShares())) for role in ROLES}
    assert sorted(document.text for side in sides.values() for document in side) == sorted(row["text"] for row in rows)  # type: ignore[index]
    groups = [{document.group for document in side} for side in sides.values()]
    assert all(groups)
    assert sum(len(side) for side in groups) == len(set().union(*groups)) == 40


def test_a_missing_group_falls_back_to_the_words(tmp_path: Path) -> None:
    rows: list[object] = [{"text": "a", "title": None}, {"text": "b", "title": "t"}]
    first, second = read_documents(TextSource(str(write_lines(tmp_path / "x.jsonl", rows)), group_column="title"))
    assert second.group == "t"
    assert len(first.group) == 32


@pytest.mark.parametrize(
    "shares", [(0.5, 0.5, 0.5, 0.5), (-0.1, 0.6, 0.25, 0.25), (0, 0, 0, 0), (float("nan"), 0.5, 0.3, 0.2)]
)
def test_shares_that_do_not_sum_to_one(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        RoleShares(*shares)


def test_names_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "TEXTS", {"xsum": None, "boolq-passages": None})
    with pytest.raises(ValueError, match="Did you mean 'xsum'"):
        open_text(TextSource("xsom"))
    for path in (str(tmp_path / "no.jsonl"), "no/file.parquet", "./no-folder", "a/b/c"):
        with pytest.raises(ValueError, match=r"nor a file or folder that exists.*boolq-passages"):
            open_text(TextSource(path))
    with pytest.raises(ValueError, match=r"Cannot open the text some/dataset.*connection"):
        open_text(TextSource("some/dataset"))


def test_bad_sources(tmp_path: Path, webtext: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'train'"):
        open_text(TextSource(str(webtext), split="trian"))
    with pytest.raises(ValueError, match=r"Cannot open the text .*openwebtext .*plain"):
        open_text(TextSource(str(webtext), name="plain"))
    with pytest.raises(ValueError, match="check its name, revision and files"):
        open_text(TextSource(str(webtext), files="plain_text/valid-*.parquet"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="Cannot open the text"):
        open_text(TextSource(str(tmp_path / "nothing")))
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemError\n")
    with pytest.raises(ValueError, match="refs/convert/parquet"):
        open_text(TextSource(str(tmp_path / "script")))
    (tmp_path / "x.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match=r"\.parquet"):
        open_text(TextSource(str(tmp_path / "x.csv")))
    (tmp_path / "x.txt").write_text("a\n")
    with pytest.raises(ValueError, match="leave `files` out"):
        open_text(TextSource(str(tmp_path / "x.txt"), files="*.txt"))
    with pytest.raises(ValueError, match=r"role 'fti'.*Did you mean 'fit'"):
        role_documents(open_text(TextSource(str(tmp_path / "x.txt"))), "fti", RoleShares())


@pytest.mark.parametrize("ending", ["jsonl", "txt", "parquet"])
def test_empty_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    path.touch()
    with pytest.raises(ValueError, match=rf"x\.{ending}.* is empty"):
        texts(TextSource(str(path)))


def test_missing_columns_name_those_present(tmp_path: Path, webtext: Path) -> None:
    with pytest.raises(ValueError, match=r"column of the text .*'txt'.*Known: text"):
        open_text(TextSource(str(webtext), column="txt"))
    with pytest.raises(ValueError, match=r"'title'.*Known: text"):
        open_text(TextSource(str(webtext), group_column="title"))
    (tmp_path / "x.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"'body'.*Known: text"):
        texts(TextSource(str(tmp_path / "x.txt"), column="body"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 5}\n', r"x\.jsonl, row 1 .* is int, not a string"),
        (b'{"text": "a"}\n{"text": null}\n', r"x\.jsonl, row 1 .* is NoneType, not a string"),
        (b'{"text": 1}\n{"text": 2}\n', r"x\.jsonl, row 0 .* is int, not a string"),
        (b'{"text": ["a"]}\n', r"x\.jsonl, row 0 .* is list, not a string"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl, row 1 .* is not UTF-8"),
        (b'{"text": "a"}\n{"text": oops\n', r"Cannot read .*x\.jsonl .*after 0 rows .*row 1"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', r"Cannot read .*x\.jsonl"),
        (b"\x00\x01\x02\x03", r"Cannot read .*x\.jsonl"),
    ],
)
def test_malformed_rows_name_file_and_row(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(TextSource(str(tmp_path / "x.jsonl")))


def test_damaged_and_vanished_shards(webtext: Path) -> None:
    text = open_text(TextSource(str(webtext)))
    shard = webtext / "plain_text" / "train-00001-of-00003.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="train-00001-of-00003"):
        list(text.documents())
    shard.unlink()
    with pytest.raises(ValueError, match="train-00001-of-00003"):
        list(text.documents())


def test_binary_text_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"fine\n\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"Cannot read .*x\.txt"):
        texts(TextSource(str(tmp_path / "x.txt")))


def left_out(source: TextSource) -> tuple[list[str], dict[str, int | None]]:
    """The documents that are left, and what was skipped, by the file's name."""
    text = open_text(source)
    documents = [document.text for document in text.documents()]
    return documents, {Path(file).name: count for file, count in text.skipped.items()}


@pytest.mark.parametrize("bad", [(b"5", b"null"), (b'"\xff"', b'"\xfe"')])
def test_bad_rows_are_skipped_and_counted_where_asked_for(tmp_path: Path, bad: tuple[bytes, ...]) -> None:
    rows = [b'{"text": "a"}', *(b'{"text": %b}' % value for value in bad), b'{"text": "b"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    source = TextSource(str(tmp_path / "x.jsonl"), bad_rows="skip")
    with pytest.warns(UserWarning, match=r"Left out 2 rows of .*x\.jsonl, which hold no text"):
        documents, skipped = left_out(source)
    assert documents == ["a", "b"]
    assert skipped == {"x.jsonl": 2}
    origins = [document.origin.row for document in open_text(source).documents()]
    assert origins == [0, 3]  # rows keep their numbers, by which reading goes on
    assert [document.text for document in open_text(source).documents(0, 2)] == ["b"]


def test_files_that_cannot_be_read_further_are_skipped_where_asked_for(webtext: Path) -> None:
    before = [document.text for document in open_text(TextSource(str(webtext))).documents()]
    shards = sorted((webtext / "plain_text").glob("*.parquet"))
    text = open_text(TextSource(str(webtext), bad_rows="skip"))
    shards[1].unlink()  # vanishes after it was found
    with pytest.warns(UserWarning, match=r"Left out the rest of .*train-00001-of-00003.parquet after 0 rows"):
        after = [document.text for document in text.documents()]
    assert {Path(file).name: count for file, count in text.skipped.items()} == {shards[1].name: None}
    assert 0 < len(after) < len(before)
    assert [row for row in before if row in after] == after


def test_a_compressed_file_that_is_cut_off(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "a b c d"}\n' * 50000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n'))
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"Cannot read .*b\.jsonl\.gz.*repair the file"):
        texts(TextSource(str(tmp_path / "b.jsonl.gz")))
    source = TextSource(str(tmp_path), files="*.jsonl.gz")
    with pytest.raises(ValueError, match=r"Cannot read .*b\.jsonl\.gz.*set bad_rows to skip"):
        texts(source)
    with pytest.warns(UserWarning, match=r"Left out the rest of .*b\.jsonl\.gz"):
        documents, skipped = left_out(replace(source, bad_rows="skip"))
    assert documents[0] == "whole"
    assert skipped == {"b.jsonl.gz": None}


def test_a_first_file_that_cannot_be_read_is_skipped_where_asked_for(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", [{"text": "sound"}])
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"\.jsonl|first file"):
        texts(TextSource(str(tmp_path)))
    with pytest.warns(UserWarning, match="Left out") as told:
        found = texts(TextSource(str(tmp_path), bad_rows="skip"))
    assert found == ["sound"]
    assert {name for name in "abc" for warning in told if f"{name}.jsonl" in str(warning.message)} == set("abc")
    (tmp_path / "d.jsonl").unlink()
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "c.jsonl").unlink()
    with (
        pytest.warns(UserWarning, match="which is empty"),
        pytest.raises(ValueError, match=r"No file of the text .* can be read"),
    ):
        open_text(TextSource(str(tmp_path), bad_rows="skip"))


def test_an_empty_compressed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz.*repair the file"):
        open_text(TextSource(str(tmp_path / "x.jsonl.gz")))


def test_files_of_another_format_are_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    write_lines(tmp_path / "b.jsonl", [{"text": "two"}])
    (tmp_path / "c.txt").write_text("three\n")
    with pytest.warns(UserWarning, match=r"of another format, and left out: \['c\.txt'\]"):
        assert texts(TextSource(str(tmp_path))) == ["one", "two"]


def test_samples_are_disjoint_and_complete_in_every_role(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "text.jsonl", [{"text": f"document {number}"} for number in range(600)])
    shares, parts = RoleShares(), Counter[str]()
    for role in ROLES:
        for sample in range(3):
            text = open_text(TextSource(str(path), sample=sample, samples=3))
            found = [document.text for document in role_documents(text, role, shares)]
            assert len(found) > 10
            parts.update(found)
    assert parts == Counter(f"document {number}" for number in range(600))
    prints = {open_text(TextSource(str(path), sample=sample, samples=3)).fingerprint for sample in range(3)}
    assert len(prints) == 3


@pytest.mark.parametrize(("sample", "samples"), [(1, 1), (-1, 2), (0, 0)])
def test_samples_that_do_not_exist(sample: int, samples: int) -> None:
    with pytest.raises(ValueError, match=f"There is no sample {sample} of {samples}"):
        TextSource("xsum", sample=sample, samples=samples)
