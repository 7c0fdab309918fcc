"""Reading multiple-choice questions, in every layout, sound and damaged."""

import csv
import json
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from depthprune import embedded
from depthprune.data.questions import ChoiceSource, Question, read_questions

GOOD = {"question": "Which?", "choices": ["one", "two", "three"], "answer": 2, "subject": "abstract_algebra"}


def write_lines(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def write_csv(path: Path, *rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_parquet(path: Path, *rows: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """The layout of MMLU's own archive."""
    folder = tmp_path / "data"
    tricky = ['She said "no, never",\nthen left.\n\nWhy?', "a, b", 'the "why"', "line\r\nbreak", "d", "C"]
    write_csv(folder / "test" / "abstract_algebra_test.csv", ["Find x.", "1", "2", "3", "4", "B"], tricky)
    write_csv(folder / "test" / "world_religions_test.csv", ["Who?", "p", "q", "r", "s", "D"])
    write_csv(folder / "dev" / "abstract_algebra_dev.csv", *[[f"Dev {i}", "1", "2", "3", "4", "A"] for i in range(5)])
    write_csv(folder / "val" / "abstract_algebra_val.csv", ["Val", "1", "2", "3", "4", "A"])
    return folder


def test_archive_of_mmlu(archive: Path) -> None:
    (archive / "test" / "._abstract_algebra_test.csv").write_bytes(b"\x00\x05\x16\x07")  # left by some archivers
    (archive / "README.txt").write_text("not a task")
    asked, dev = read_questions(ChoiceSource(str(archive)))
    algebra = archive / "test" / "abstract_algebra_test.csv"
    assert asked[:2] == [
        Question("Find x.", ("1", "2", "3", "4"), 1, "abstract algebra", f"{algebra}, row 0 (counted from 0)"),
        Question(
            'She said "no, never",\nthen left.\n\nWhy?',
            ("a, b", 'the "why"', "line\r\nbreak", "d"),
            2,
            "abstract algebra",
            f"{algebra}, row 1 (counted from 0)",
        ),
    ]
    assert (asked[2].subject, asked[2].answer) == ("world religions", 3)
    assert len(asked) == 3
    assert [(question.question, question.subject) for question in dev] == [
        (f"Dev {i}", "abstract algebra") for i in range(5)
    ]
    for split in ("val", "validation"):
        assert [q.question for q in read_questions(ChoiceSource(str(archive), split=split))[0]] == ["Val"]
    asked, dev = read_questions(ChoiceSource(str(archive), split="dev"))
    assert asked == dev


def test_one_csv_file_knows_its_subject(archive: Path) -> None:
    asked, dev = read_questions(ChoiceSource(str(archive / "test" / "world_religions_test.csv")))
    assert [question.subject for question in asked] == ["world religions"]
    assert dev == []


@pytest.mark.parametrize(
    "names",
    [
        ("test-00000-of-00002.parquet", "test-00001-of-00002.parquet", "dev-00000-of-00001.parquet"),
        ("test/0000.parquet", "test/0001.parquet", "dev/0000.parquet"),
        ("data/test-0.parquet", "data/test-1.parquet", "data/dev-0.parquet"),
    ],
)
def test_parquet_of_the_hub(names: tuple[str, ...], tmp_path: Path) -> None:
    first, second, dev_file = (tmp_path / "all" / name for name in names)
    write_parquet(first, *[{**GOOD, "question": f"Which {i}?"} for i in range(3)])
    write_parquet(second, {**GOOD, "question": "Last?", "answer": 0, "subject": "law"})
    write_parquet(dev_file, GOOD)
    asked, dev = read_questions(ChoiceSource(str(tmp_path / "all")))
    assert [question.question for question in asked] == ["Which 0?", "Which 1?", "Which 2?", "Last?"]
    assert asked[2] == Question(
        "Which 2?", ("one", "two", "three"), 2, "abstract algebra", f"{first}, row 2 (counted from 0)"
    )
    assert (asked[3].answer, asked[3].subject) == (0, "law")
    assert len(dev) == 1
    with pytest.raises(ValueError, match=r"Unknown split of the task .*'tset'. Did you mean 'test'.*Known: dev, test"):
        read_questions(ChoiceSource(str(tmp_path / "all"), split="tset"))
    assert len(read_questions(ChoiceSource(str(first)))[0]) == 3


def test_several_data_sets_in_one_folder(tmp_path: Path) -> None:
    for name in ("all", "law"):
        write_parquet(tmp_path / name / "test-00000-of-00001.parquet", GOOD)
    with pytest.raises(ValueError, match=r"stands in several places \(all/\*\.parquet, law/\*\.parquet\): name one"):
        read_questions(ChoiceSource(str(tmp_path)))
    write_lines(tmp_path / "law" / "test.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"\(\./\*\.jsonl, \./\*\.parquet\)"):
        read_questions(ChoiceSource(str(tmp_path / "law")))


def test_json_lines(tmp_path: Path) -> None:
    lettered = {"question": "Q", "options": ["a", "b"], "answer": " B "}
    path = write_lines(tmp_path / "x.jsonl", GOOD, "", lettered)
    asked, _ = read_questions(ChoiceSource(path))
    assert [question.answer for question in asked] == [2, 1]
    assert [question.subject for question in asked] == ["abstract algebra", ""]
    assert asked[1].origin == f"{path}, row 2 (counted from 0)"


BAD = [
    ({"answer": None}, "has no answer"),
    ({"answer": ""}, "has no answer"),
    ({"answer": -1}, "has the answer -1, which is none of its 3 options"),
    ({"answer": 3}, "has the answer 3, which is none of its 3 options"),
    ({"answer": "D"}, "has the answer 'D', which is none of its 3 options"),
    ({"answer": "AB"}, "has the answer 'AB', which is none of its 3 options"),
    ({"answer": True}, "has the answer True, which is none"),
    ({"answer": 1.0}, "has the answer 1.0, which is none"),
    ({"choices": ["one"], "answer": 0}, "has 1 options, not 2 to 10"),
    ({"choices": []}, "has 0 options, not 2 to 10"),
    ({"choices": [str(i) for i in range(11)]}, "has 11 options, not 2 to 10"),
    ({"choices": None}, "has no list of options"),
    ({"choices": "A. one B. two"}, "has no list of options"),
    ({"choices": ["one", " ", "three"]}, "has an option that is empty or no text"),
    ({"choices": ["one", 2, "three"]}, "has an option that is empty or no text"),
    ({"question": " \n"}, "has no question"),
    ({"question": None}, "has no question"),
    ({"question": "half \ud800"}, "has no question"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_questions_name_file_and_row(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", GOOD, {**GOOD, **change}, GOOD)
    with pytest.raises(ValueError, match=r"x\.jsonl, row 1 \(counted from 0\), " + message) as caught:
        read_questions(ChoiceSource(path))
    assert str(caught.value).endswith("repair or delete the row, or set bad_questions to skip.")
    with pytest.warns(UserWarning, match=rf"Left out 1 questions of the task .*x\.jsonl, row 1 .*{message}"):
        asked, _ = read_questions(ChoiceSource(path, bad_questions="skip"))
    assert [question.origin.split(", ")[-1] for question in asked] == [f"row {i} (counted from 0)" for i in (0, 2)]


def test_ten_options_are_not_too_many(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {**GOOD, "choices": [str(i) for i in range(10)], "answer": "J"})
    assert read_questions(ChoiceSource(path))[0][0].answer == 9


def test_all_that_was_left_out_is_counted(archive: Path) -> None:
    write_csv(archive / "test" / "law_test.csv", ["Q", "a", "b", "c", "d", ""], ["Q"], ["Q", "a", "b", "c", "d", "E"])
    write_csv(archive / "dev" / "law_dev.csv", ["Q", "a", "", "c", "d", "A"])
    with pytest.raises(ValueError, match=r"law_test\.csv, row 0 \(counted from 0\), has no answer"):
        read_questions(ChoiceSource(str(archive)))
    with pytest.warns(UserWarning, match=r"Left out 4 questions .*first: .*law_test\.csv, row 0") as told:
        asked, dev = read_questions(ChoiceSource(str(archive), bad_questions="skip"))
    assert (len(asked), len(dev), len(told)) == (3, 5, 1)


def test_sound_tasks_are_quiet(archive: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_questions(ChoiceSource(str(archive), bad_questions="skip"))


@pytest.mark.parametrize("line", ["{oops", "[1, 2]", "5"])
def test_lines_that_are_no_objects(line: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", GOOD, line)
    with pytest.raises(ValueError, match=r"x\.jsonl, row 1 \(counted from 0\), is not a JSON object"):
        read_questions(ChoiceSource(path))
    with pytest.warns(UserWarning, match="Left out 1 questions"):
        assert len(read_questions(ChoiceSource(path, bad_questions="skip"))[0]) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"question": "\xff"}\n'),
        ("x.parquet", b"PAR1 and then nothing"),
        ("x.parquet", b""),
        ("x.csv", b'"unfinished,a,b,c,d,A\n'),
        ("x.csv", b"q,\xff,b,c,d,A\n"),
    ],
)
@pytest.mark.parametrize("way", ["error", "skip"])
def test_files_that_cannot_be_read(name: str, content: bytes, way: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"Cannot read .*{name} of the task .*: repair or replace it"):
        read_questions(ChoiceSource(str(tmp_path / name), bad_questions=way))


def test_empty_tasks(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"folder .*nothing holds no task: it needs test/\*_test\.csv"):
        read_questions(ChoiceSource(str(tmp_path / "nothing")))
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ValueError, match=r"x\.jsonl has no questions \(its files are empty\)"):
        read_questions(ChoiceSource(str(tmp_path / "x.jsonl")))
    path = write_lines(tmp_path / "y.jsonl", {**GOOD, "answer": None})
    with (
        pytest.warns(UserWarning, match="Left out 1 questions"),
        pytest.raises(ValueError, match=r"y\.jsonl has no questions \(1 bad ones were left out\)"),
    ):
        read_questions(ChoiceSource(path, bad_questions="skip"))


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown task .*'openbookq'. Did you mean 'openbookqa'"):
        read_questions(ChoiceSource("openbookq"))
    for path in ("", " ", str(tmp_path / "no.jsonl")):
        with pytest.raises(ValueError, match=r"Unknown task \(neither an embedded name"):
            read_questions(ChoiceSource(path))
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ValueError, match=r"none of the endings \.csv, \.parquet, \.jsonl"):
        read_questions(ChoiceSource(str(tmp_path / "x.txt")))


def test_embedded_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"question": "Q", "options": ["yes", "no"], "answer": 1, "subject": ""}
    file = Path(write_lines(tmp_path / "boolq.jsonl", row))
    monkeypatch.setattr(embedded, "task_file", lambda name: {"boolq": file}[name])
    asked, dev = read_questions(ChoiceSource("boolq"))
    assert asked == [Question("Q", ("yes", "no"), 1, "", f"{file}, row 0 (counted from 0)")]
    assert dev == []
    for path in ("boolq", str(file)):
        with pytest.raises(ValueError, match="is one file and has no splits: leave `split` out"):
            read_questions(ChoiceSource(path, split="dev"))
