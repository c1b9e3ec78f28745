"""From files and flags to documents: recognised by columns, tokenised once, the same whatever the workers."""

import json

import datasets
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ldmole_ds.tasks import DataError
from ldmole_ds.tasks.sft import tokens
from ldmole_ds.training.argument_groups import DataArguments, LDMoLETrainingArguments
from ldmole_ds.training.arguments import parse_flags
from ldmole_ds.training.data import load_choice_data
from ldmole_ds.training.sft import is_sft_data, load_sft_data, token_mean_metrics

TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
PAIRS = [{"prompt": f"{i} and one is", "completion": f" {i + 1}"} for i in range(30)]


CHATML = (
    "{% for m in messages %}{{ '<eos>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<eos>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    """A word is a token, and so is each sign."""
    words = "one two three four five six seven eight nine ten count and is".split()
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *words, *map(str, range(40))])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHATML
    return fast


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder / "ldmole_ds"


def written(folder, rows, name="train"):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / f"{name}.jsonl")


def contents(dataset):
    return [dataset[i] for i in range(len(dataset))]


def test_columns_tell_what_a_file_is(tmp_path):
    for rows, expected in (
        ([{"messages": TURNS}], True),
        (PAIRS, True),
        ([{"text": "a", "label": "b"}], False),
        ([{"question": "a", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}], False),
    ):
        file = written(tmp_path, rows)
        assert is_sft_data(DataArguments(train_file=file)) is expected
        assert is_sft_data(DataArguments(dataset_name=str(tmp_path))) is expected
        assert not is_sft_data(DataArguments(train_file=file, text_column="prompt", label_column="completion"))
    assert not is_sft_data(DataArguments(task="cola")) and not is_sft_data(DataArguments())


def test_a_second_run_finds_the_tokens(tmp_path, tokenizer, cache, monkeypatch):
    file = written(tmp_path, [{"messages": TURNS}, *PAIRS])
    arguments = DataArguments(train_file=file, validation_file=file, max_eval_samples=3)
    first = load_sft_data(arguments, tokenizer)
    assert len(first.train) == 31 and len(first.validation) == 3 and not first.plain
    assert tokenizer.decode(first.train[0].input_ids[-3:]).split() == ["two", "three", "<eos>"]
    assert len(list(cache.glob("*/"))) == 2 and not list(cache.glob("*.tmp"))

    made = []
    monkeypatch.setattr(tokens, "_write", lambda *args: made.append(args[-1]) or written_before(*args))
    again = load_sft_data(arguments, tokenizer)
    assert made == [] and contents(again.train) == contents(first.train)
    # Whatever decides the tokens makes a table of its own.
    for change in ({"max_seq_length": 99}, {"max_train_samples": 5}):
        load_sft_data(DataArguments(train_file=file, **change), tokenizer)
    tokenizer.chat_template = CHATML.replace("<eos>assistant", "<eos>assistant:")
    with pytest.raises(DataError, match="does not begin message 2"):
        load_sft_data(DataArguments(train_file=file), tokenizer)
    tokenizer.chat_template = CHATML
    written(tmp_path, PAIRS)
    load_sft_data(DataArguments(train_file=file), tokenizer)
    assert len(made) == len(set(made)) == 4


written_before = tokens._write


def test_workers_and_datasets_change_nothing(tmp_path, tokenizer, monkeypatch):
    written(tmp_path, PAIRS)
    file = written(tmp_path, PAIRS[:4], "validation").replace("validation", "train")
    from_file = load_sft_data(DataArguments(train_file=file, packing=True, max_seq_length=40), tokenizer)
    monkeypatch.setattr(tokens, "_ROWS_PER_WORKER", 10)
    by_name = DataArguments(dataset_name=str(tmp_path), packing=True, max_seq_length=40, preprocessing_num_workers=2)
    from_name = load_sft_data(by_name, tokenizer)
    assert contents(from_name.documents) == contents(from_file.documents)
    assert from_name.train.rows == from_file.train.rows and len(from_name.validation) == 4
    assert sum(from_name.train.lengths) == sum(from_name.documents.lengths) and from_name.longest_row <= 40
    assert "packed into" in from_name.summary()
    longest = int(from_name.documents.lengths.max())
    assert from_name.longest_row > longest
    from_name.check_positions(longest)
    with pytest.raises(DataError, match=f"use --max_seq_length {longest - 1}"):
        from_name.check_positions(longest - 1)


def test_an_error_of_a_worker_names_its_row(tmp_path, tokenizer, cache, monkeypatch):
    monkeypatch.setattr(tokens, "_ROWS_PER_WORKER", 10)
    file = written(tmp_path, [*PAIRS, {"messages": TURNS[:1]}])
    with pytest.raises(DataError, match=r"train.jsonl:31: no assistant turn"):
        load_sft_data(DataArguments(train_file=file, preprocessing_num_workers=2), tokenizer)
    assert not list(cache.glob("*.tmp")) and not list(cache.glob("*/"))


def test_what_is_too_long_is_counted_and_never_trains_on_nothing(tmp_path, tokenizer):
    long = {"prompt": "one two three four five six seven eight", "completion": " nine"}
    answer = {"prompt": "count", "completion": " one two three four five six seven eight nine ten"}
    file = written(tmp_path, [*PAIRS, long, answer])
    data = load_sft_data(DataArguments(train_file=file, max_seq_length=7), tokenizer)
    assert (len(data.train), data.documents.num_truncated, data.documents.num_left_out) == (31, 1, 1)
    assert "1 cut to --max_seq_length; 1 left out" in data.summary()
    assert tokenizer.decode(data.train[30].input_ids) == "four five six seven eight nine <eos>"
    assert data.documents.num_answer_tokens == sum(sum(t != -100 for t in d.labels) for d in contents(data.train))
    with pytest.raises(DataError, match="no answer fits --max_seq_length 2, so there is nothing to train on"):
        load_sft_data(DataArguments(train_file=file, max_seq_length=2), tokenizer)


def test_settings_that_do_not_fit_are_refused(tmp_path, tokenizer):
    file = written(tmp_path, PAIRS)
    for change, message in (
        ({"label_words": "words.json"}, "--label_words is for questions"),
        ({"max_seq_length": 0}, "--max_seq_length must be at least 1"),
        ({"max_train_samples": 0}, "--max_train_samples must be at least 1"),
        ({"preprocessing_num_workers": 0}, "--preprocessing_num_workers must be"),
    ):
        with pytest.raises(DataError, match=message):
            load_sft_data(DataArguments(train_file=file, **change), tokenizer)
    with pytest.raises(DataError, match="has no rows"):
        is_sft_data(DataArguments(train_file=written(tmp_path, [])))
    labelled = written(tmp_path, [{"text": "a", "label": "b"}])
    with pytest.raises(DataError, match="--packing is for rows with messages"):
        load_choice_data(DataArguments(train_file=labelled, packing=True), tokenizer)


def test_the_flags_are_flags():
    flags = parse_flags(["--train_file", "a", "--packing", "--max_seq_length", "64", "--output_dir", "unused"])
    assert flags.packing is True and flags.max_seq_length == 64 and flags.preprocessing_num_workers is None
    assert not {"packing", "max_seq_length"} & set(LDMoLETrainingArguments.__dataclass_fields__)


def test_perplexity_is_that_of_the_mean_over_tokens():
    import numpy as np
    from transformers import EvalPrediction

    prediction = EvalPrediction(np.array([2.0, 6.0], dtype=np.float32), np.array([1, 3]))
    assert token_mean_metrics(prediction) == {"loss": 2.0, "perplexity": pytest.approx(7.389056)}
