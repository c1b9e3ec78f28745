"""Reading rows: both forms of a file, true line numbers, and what is refused."""

import pytest

from ldmole_ds.tasks.rows import DataError, number_rows, read_rows


@pytest.fixture
def write(tmp_path):
    def _write(content, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    return _write


def test_lines_keep_their_numbers_across_blank_lines(write):
    path = write('\ufeff{"a": 1}\r\n\r\n{"a": "x\u2028y"}\r\n')
    rows = read_rows(path)
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert rows[1].fields["a"] == "x\u2028y"


def test_items_of_a_list_have_the_line_they_start_on(write):
    path = write('\n[\n  {"a":\n 1},\n {"a": 2}, {"a": 3}\n]\n', "data.json")
    assert [(row.where, row.fields["a"]) for row in read_rows(path)] == [
        (f"{path}:3", 1),
        (f"{path}:5", 2),
        (f"{path}:5", 3),
    ]


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ('{"a": 1}\n{"a": \n', ":2: ", "not valid JSON"),
        ('{"a": 1}\n"text"\n', ":2: ", "the row is a string; expected a JSON object"),
        ('[{"a": 1},\n 3]', ":2: ", "the row is a number; expected a JSON object"),
        ('[{"a": 1},\n]', ":2: ", "not valid JSON"),
        ('[{"a": 1}\n {"a": 2}]', ":2: ", "no comma or ]"),
        ('[{"a": 1}', ":1: ", "no comma or ]"),
        ('[{"a": 1}]\n\n{"a": 2}', ":3: ", "text after the end of the list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2: ", "not UTF-8"),
        ('{"a": "\\ud83d\\ude00"}\n{"a": ["\\ud83d"]}\n', ":2: ", "holds \\ud83d, half of a character"),
        ("", ": ", "no rows; expected one JSON object a line"),
        ("\n \n", ": ", "no rows"),
        ("[]", ": ", "no rows"),
    ],
)
def test_bad_files(write, content, line, said):
    path = write(content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}{line}")
    assert said in str(caught.value)
    assert "expected" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="none.jsonl: cannot be read .*; expected a JSON Lines file"):
        read_rows(tmp_path / "none.jsonl")


def test_rows_without_a_file_are_numbered_from_one():
    assert [row.where for row in number_rows([{}, {}], "hub/name")] == ["hub/name:1", "hub/name:2"]
    with pytest.raises(DataError, match="^hub/name: the dataset has no rows; expected"):
        number_rows([], "hub/name")
    with pytest.raises(DataError, match="^hub/name:2: the row is a list; expected"):
        number_rows([{}, []], "hub/name")
