"""Rows from files and from datasets become the same questions."""

import json

import pytest
from transformers import AutoTokenizer

from ldmole_ds.tasks import DataError, demo_model_file
from ldmole_ds.training.argument_groups import DataArguments
from ldmole_ds.training.data import load_choice_data

ROWS = [{"text": f"message {i}", "label": ("spam", "ham")[i % 2]} for i in range(8)]
CHOICE = {"question": "Two?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "2"}


@pytest.fixture(scope="module")
def tokenizer():
    file = demo_model_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture
def dataset_folder(tmp_path):
    """A dataset as ``datasets`` loads it from a folder: train and validation in JSON Lines."""
    for split, rows in (("train", ROWS), ("validation", ROWS[:2])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_a_dataset_gives_what_its_files_give(tokenizer, dataset_folder):
    from_name = load_choice_data(DataArguments(dataset_name=str(dataset_folder)), tokenizer)
    files = {"train_file": str(dataset_folder / "train.jsonl")}
    files["validation_file"] = str(dataset_folder / "validation.jsonl")
    from_files = load_choice_data(DataArguments(**files), tokenizer)
    assert from_name.train.questions == from_files.train.questions
    assert from_name.validation.questions == from_files.validation.questions
    assert from_name.label_words == ["ham", "spam"]


def test_a_validation_split_that_is_asked_for_is_loaded_or_missed(tokenizer, dataset_folder):
    arguments = {"dataset_name": str(dataset_folder), "train_split": "train[:6]"}
    data = load_choice_data(DataArguments(**arguments, validation_split="train[6:]"), tokenizer)
    assert (len(data.train), len(data.validation)) == (6, 2)
    with pytest.raises(DataError, match="could not be loaded.*--validation_split"):
        load_choice_data(DataArguments(**arguments, validation_split="test"), tokenizer)


def test_limits_take_the_first_rows_and_validation_is_optional(tokenizer, dataset_folder):
    data = load_choice_data(
        DataArguments(train_file=str(dataset_folder / "train.jsonl"), max_train_samples=3), tokenizer
    )
    assert len(data.train) == 3 and data.validation is None


def test_label_words_of_another_encoding(tokenizer, tmp_path, dataset_folder):
    path = tmp_path / "words.json"
    arguments = DataArguments(train_file=str(dataset_folder / "train.jsonl"), label_words=str(path))
    path.write_bytes(b'\xef\xbb\xbf{"ham": "good"}')
    assert load_choice_data(arguments, tokenizer).label_words == ["good", "spam"]
    path.write_bytes(b'{"ham": "\xff"}')
    with pytest.raises(DataError, match=r"--label_words .*words\.json.*expected a JSON file of label to word"):
        load_choice_data(arguments, tokenizer)


def test_multiple_choice_has_no_label_words(tokenizer, tmp_path):
    path = tmp_path / "choice.jsonl"
    path.write_text(json.dumps(CHOICE) + "\n")
    data = load_choice_data(DataArguments(train_file=str(path)), tokenizer)
    assert data.label_words is None and data.train[0].gold == 1 and data.single_token


def test_a_dataset_that_cannot_be_loaded_says_what_to_check(tokenizer):
    with pytest.raises(DataError, match=r"--dataset_name 'no/such-set' could not be loaded.*--train_file") as caught:
        load_choice_data(DataArguments(dataset_name="no/such-set"), tokenizer)
    assert "\n" not in str(caught.value)


def test_no_data_at_all_is_an_error(tokenizer):
    with pytest.raises(DataError, match="give --train_file"):
        load_choice_data(DataArguments(), tokenizer)
