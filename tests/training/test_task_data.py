"""--task: rows of the benchmarks as training and held-out sets, alone and mixed, and the flags that go with them."""

from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ldmole_ds.tasks import TASKS, DataError, demo_model_file
from ldmole_ds.training.argument_groups import DataArguments
from ldmole_ds.training.arguments import parse_flags
from ldmole_ds.training.data import load_choice_data
from ldmole_ds.training.runtime import UserError

ROWS = str(Path(__file__).parents[1] / "tasks" / "benchmark_rows")
PAPER = [name for name in TASKS if name != "clinc_domains"]


@pytest.fixture(scope="module")
def tokenizer():
    file = demo_model_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def load(tokenizer, task, **changes):
    return load_choice_data(DataArguments(task=task, data_dir=ROWS, **changes), tokenizer)


def test_all_nine_at_once_are_scored_in_one_pass(tokenizer):
    """Letters are one token each, of every task; the batch has room for ten of them."""
    data = load(tokenizer, ",".join(PAPER), mixture="equal")
    assert data.single_token and data.collator.max_candidates == 10 and data.label_words is None
    assert Counter(q.task for q in data.train.questions) == dict.fromkeys(PAPER, 6)
    assert Counter(q.task for q in data.validation.questions) == dict.fromkeys(PAPER, 6)
    assert data.train.num_truncated == 0
    batch = data.collator(data.train.questions[:9])
    assert batch["candidate_ids"].shape == (9, 10, 1) and (batch["candidate_lengths"] == 1).all()


def test_cloze_divides_by_characters(tokenizer):
    data = load(tokenizer, "swag", scoring="cloze")
    first = data.train[0]
    assert not data.single_token
    assert [len(tokenizer.decode(ids)) - 1 for ids in first.candidate_ids] == list(first.lengths)
    batch = data.collator([first])
    assert batch["candidate_lengths"][0, :4].tolist() == list(first.lengths)
    # What is learned is the text of the right option.
    answer = batch["labels"][0][batch["labels"][0] != -100]
    assert answer.tolist() == list(first.candidate_ids[first.gold])


def test_a_mixture_weighs_tasks_and_repeats_small_ones(tokenizer):
    data = load(tokenizer, "rte,cola", mixture="1:2", max_train_samples=4, max_eval_samples=3)
    assert Counter(q.task for q in data.train.questions) == {"rte": 4, "cola": 8}
    assert [q.task for q in data.train.questions[:3]] == ["cola", "rte", "cola"]
    assert Counter(q.task for q in data.validation.questions) == {"rte": 3, "cola": 3}
    assert data.description == "rte,cola, mixed by 1:2"


def test_splits_may_be_chosen(tokenizer):
    data = load(tokenizer, "rte", train_split="validation", validation_split="train")
    usual = load(tokenizer, "rte")
    assert {q.prompt_ids for q in data.train.questions} == {q.prompt_ids for q in usual.validation.questions}
    assert {q.prompt_ids for q in data.validation.questions} == {q.prompt_ids for q in usual.train.questions}


def test_only_topics_have_label_words(tokenizer):
    words = load(tokenizer, "clinc_domains", max_train_samples=2, max_eval_samples=2).label_words
    assert len(words) == 10 and "travel" in words
    for other in ({"task": "clinc_domains", "scoring": "letters"}, {"task": "cola", "scoring": "cloze"}):
        assert load(tokenizer, **other, max_train_samples=2, max_eval_samples=2).label_words is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "rte", "train_file": "x.jsonl"}, "--train_file is for rows of your own and --task for benchmarks"),
        ({"task": "rte", "label_words": "x.json"}, "--label_words is for rows of your own"),
        ({"scoring": "cloze", "train_file": "x.jsonl"}, "--scoring cloze is for --task"),
        ({"data_dir": ROWS, "train_file": "x.jsonl"}, "--data_dir .* is for --task"),
        ({"mixture": "equal", "train_file": "x.jsonl"}, "--mixture equal is for --task"),
        ({"task": "rte,cola", "data_dir": ROWS, "mixture": "1"}, "--mixture '1' does not fit 2 tasks"),
        (
            {"task": "rte", "data_dir": ROWS, "validation_split": "dev"},
            r"dev\.jsonl does not exist; the folder has",
        ),
    ],
)
def test_flags_that_do_not_go_together(tokenizer, changes, said):
    with pytest.raises(DataError, match=said):
        load_choice_data(DataArguments(**changes), tokenizer)


def test_multiple_choice_is_smoothed_unless_asked_otherwise():
    def smoothing(*argv):
        return parse_flags(["--output_dir", "x", *argv]).label_smoothing_factor

    assert smoothing() == smoothing("--task", "cola") == smoothing("--task", "clinc_domains") == 0.0
    assert smoothing("--task", "arc_easy") == smoothing("--task", "cola,arc_easy") == 0.1
    assert smoothing("--task", "arc_easy", "--label_smoothing_factor", "0.3") == 0.3
    assert smoothing("--task", "arc_easy", "--label_smoothing_factor", "0") == 0.0
    with pytest.raises(UserError, match="--task 'arc' is not known"):
        parse_flags(["--task", "arc"])


def test_a_task_is_no_embedded_run():
    flags = parse_flags(["--task", "rte"], {"train_file": "embedded.jsonl", "max_steps": 70})
    assert flags.train_file is None and flags.max_steps == -1
