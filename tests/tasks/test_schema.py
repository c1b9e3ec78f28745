"""Rows to questions: both schemas, labels shared between splits, and every row that is refused."""

import json

import pytest

from ldmole_ds.tasks import DataError, Question, labels_from_rows, questions_from_rows, read_labels, read_questions


def choice_row(**changes):
    row = {
        "question": "What?",
        "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    return {**row, **changes}


def choices(text, label):
    return {"text": text, "label": label}


LABELLED = [{"text": "pay a bill", "label": "bank"}, {"text": "book a flight", "label": "travel"}]


@pytest.fixture
def write(tmp_path):
    def _write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return _write


def refused(call, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_multiple_choice(write):
    stem = {"question_stem": "Why?", "choices": choices(["so", "no"], ["1", "2"]), "answerKey": "1"}
    assert read_questions(write([choice_row(), stem])) == [
        Question("What?\nA. one\nB. two\nC. three\nAnswer:", (" A", " B", " C"), 1),
        Question("Why?\nA. so\nB. no\nAnswer:", (" A", " B"), 0),
    ]


def test_a_json_list_reads_as_the_same_questions(write, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(LABELLED), encoding="utf-8")
    assert read_questions(path) == read_questions(write(LABELLED))


def test_text_and_label(write):
    assert read_questions(write(LABELLED), label_words={"bank": "money"}) == [
        Question("Topics: money, travel\n\nMessage: pay a bill\nTopic:", (" money", " travel"), 0),
        Question("Topics: money, travel\n\nMessage: book a flight\nTopic:", (" money", " travel"), 1),
    ]


def test_named_columns_and_integer_or_boolean_labels():
    rows = [{"s": "a", "y": 1}, {"s": "b", "y": 0}]
    named = questions_from_rows(rows, "hub", text_column="s", label_column="y", label_names=["no", "yes"])
    assert [(q.candidates, q.gold) for q in named] == [((" no", " yes"), 1), ((" no", " yes"), 0)]
    digits = questions_from_rows(rows, "hub", text_column="s", label_column="y")
    assert [(q.candidates, q.gold) for q in digits] == [((" 0", " 1"), 1), ((" 0", " 1"), 0)]
    truth = questions_from_rows([{"text": "a", "label": True}, {"text": "b", "label": False}], "hub")
    assert [(q.candidates, q.gold) for q in truth] == [((" false", " true"), 1), ((" false", " true"), 0)]


def test_one_named_column_leaves_the_other_at_its_default():
    rows = [{"text": "a", "domain": "x"}, {"text": "b", "domain": "y"}]
    assert [q.gold for q in questions_from_rows(rows, "hub", label_column="domain")] == [0, 1]


def test_validation_uses_the_labels_of_training(write):
    labels = read_labels(write([*LABELLED, {"text": "add salt", "label": "food"}], "train.jsonl"))
    assert labels == ["bank", "food", "travel"]
    # A validation file may hold one label only, and its candidates are those of training.
    question = read_questions(write(LABELLED[1:], "validation.jsonl"), labels=labels)[0]
    assert (question.candidates, question.gold) == ((" bank", " food", " travel"), 2)
    path = write([*LABELLED, {"text": "hi", "label": "chat"}], "other.jsonl")
    assert refused(read_questions, path, labels=labels) == (
        f"{path}:3: label 'chat' is not among the training labels; expected one of 'bank', 'food', 'travel'"
    )


def test_multiple_choice_has_no_labels_and_neither_may_its_validation():
    assert labels_from_rows([choice_row()], "hub") == []
    assert len(questions_from_rows([choice_row()], "hub", labels=[])) == 1
    assert "hub:1: the row is text and label; expected multiple choice, as in the training data" in refused(
        questions_from_rows, LABELLED, "hub", labels=[]
    )
    assert "hub:1: the row is multiple choice; expected text and label, as in the training data" in refused(
        questions_from_rows, [choice_row()], "hub", labels=["a", "b"]
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "What?", "answerKey": "B"}, "no key 'choices'; expected {"),
        ({"choices": choices(["a", "b"], ["A", "B"]), "answerKey": "B"}, "no key 'question'; expected {"),
        ({"question": "What?", "choices": choices(["a", "b"], ["A", "B"])}, "no key 'answerKey'; expected {"),
        (choice_row(question=3), "'question' is of type int; expected a string"),
        (choice_row(question=" "), "'question' is empty; expected some text"),
        (choice_row(choices=["a", "b"]), '"choices" has the wrong form; expected {"text": [...], "label": [...]}'),
        (choice_row(choices={"text": ["a", "b"]}), '"choices" has the wrong form; expected'),
        (choice_row(choices=choices(["a", None], ["A", "B"])), "option 2 is of type NoneType; expected a string"),
        (choice_row(choices=choices(["a", ""], ["A", "B"])), "option 2 is empty; expected some text"),
        (choice_row(choices=choices(["a", "b"], [1, 2])), "option label 1 is of type int; expected a string"),
        (choice_row(choices=choices(["a", "b"], ["A", "B", "C"])), "2 texts and 3 labels; expected as many of each"),
        (choice_row(choices=choices(["a", "b"], ["B", "B"])), "option label 'B' occurs twice; expected labels that"),
        (choice_row(choices=choices(["a"], ["B"])), "the question has 1 options; expected 2 to 26"),
        (choice_row(choices=choices(["a"] * 27, [str(n) for n in range(27)])), "has 27 options; expected 2 to 26"),
        (choice_row(answerKey="D"), "answerKey 'D' is not among the option labels; expected 'A', 'B', 'C'"),
        (choice_row(answerKey=2), "answerKey 2 is not among the option labels; expected 'A', 'B', 'C'"),
        (LABELLED[0], "the row is text and label; expected multiple choice, as in the first row"),
    ],
)
def test_bad_multiple_choice_rows(write, row, said):
    path = write([choice_row(), row])
    message = refused(read_questions, path)
    assert message.startswith(f"{path}:2: ")
    assert said in message


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "no key 'label'; expected 'text' and 'label', or other columns with --text_column"),
        ({"label": "x"}, "no key 'text'; expected"),
        ({"text": 1, "label": "x"}, "'text' is of type int; expected a string"),
        ({"text": "", "label": "x"}, "'text' is empty; expected some text"),
        ({"text": "x", "label": ""}, "'label' is empty; expected the name of a label"),
        ({"text": "x", "label": 0.5}, "'label' is of type float; expected a label as a string, integer or boolean"),
        (choice_row(), "the row is multiple choice; expected text and label, as in the first row"),
    ],
)
def test_bad_text_and_label_rows(write, row, said):
    path = write([*LABELLED, row])
    for read in (read_questions, read_labels):
        message = refused(read, path)
        assert message.startswith(f"{path}:3: ")
        assert said in message


def test_a_label_column_with_one_value():
    message = refused(questions_from_rows, LABELLED[:1] * 2, "hub")
    assert message.startswith("hub:1: column 'label' is 'bank' from this row to the last; expected at least two")
    assert "--label_column" in message


def test_unknown_schema():
    message = refused(questions_from_rows, [{"sentence": "x", "y": 1}], "hub")
    assert message.startswith("hub:1: no known schema in the keys 'sentence', 'y'; expected {")
    assert "--text_column" in message
    assert "no known schema in the keys of an empty object" in refused(questions_from_rows, [{}], "hub")


@pytest.mark.parametrize("name", ["label_words", "label_names"])
def test_words_and_names_are_for_labels_only(name):
    message = refused(questions_from_rows, [choice_row()], "hub", **{name: {"A": "x"}})
    assert message == f"hub:1: rows are multiple choice and have no use for {name}; leave it out"
