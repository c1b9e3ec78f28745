"""Label names, their order, and their words."""

import pytest

from ldmole_ds.tasks.labels import LabelSet, label_name, listed
from ldmole_ds.tasks.rows import DataError


def test_labels_are_sorted_and_words_default_to_the_spelled_out_name():
    labels = LabelSet.build(["small_talk", "e-mail", "meta", "meta", "-"], {"meta": " the  assistant "})
    assert labels.labels == ("-", "e-mail", "meta", "small_talk")
    assert labels.words == ("-", "e mail", "the assistant", "small talk")
    assert labels.candidates == (" -", " e mail", " the assistant", " small talk")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"c": "x"}, "'c' is not a label of this task; expected only keys among 'a', 'b'"),
        ({"a": "b"}, "labels 'a' and 'b' both have the word 'b'; give them different words in label_words"),
        ({"a": " "}, "the word of 'a' is empty; expected"),
        ({"a": 1}, "the word of 'a' is of type int; expected a string"),
    ],
)
def test_bad_words(words, said):
    with pytest.raises(DataError) as caught:
        LabelSet.build(["a", "b"], words)
    assert said in str(caught.value)


def test_names_that_differ_in_a_hyphen_need_words():
    with pytest.raises(DataError, match="'a-b' and 'a_b' both have the word 'a b'"):
        LabelSet.build(["a_b", "a-b"])


@pytest.mark.parametrize(("value", "name"), [("spam", "spam"), (3, "3"), (True, "true"), (False, "false")])
def test_label_name(value, name):
    assert label_name(value, "f:1", "label") == name


def test_integer_labels_take_their_names():
    assert label_name(1, "f:1", "label", ["ham", "spam"]) == "spam"
    for value in (-1, 2):
        with pytest.raises(
            DataError, match=rf"^f:1: 'label' is {value}, which has no name; expected 0 to 1 .*-1 marks"
        ):
            label_name(value, "f:1", "label", ["ham", "spam"])


@pytest.mark.parametrize(("value", "said"), [(0.5, "type float"), (None, "type NoneType"), (" ", "is empty")])
def test_bad_labels(value, said):
    with pytest.raises(DataError, match=f"^f:1: 'label' is .*{said.split()[-1]}; expected"):
        label_name(value, "f:1", "label")


def test_long_lists_are_cut():
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed([str(n) for n in range(15)]).endswith("'11' and 3 more")
