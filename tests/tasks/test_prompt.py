"""Both prompts, in full."""

import pytest

from ldmole_ds.tasks.prompt import classification_prompt, multiple_choice_candidates, multiple_choice_prompt


def test_multiple_choice():
    options = ["food ", "light", "water"]
    assert multiple_choice_prompt(" What do green algae make? ", options) == (
        "What do green algae make?\nA. food\nB. light\nC. water\nAnswer:"
    )
    assert multiple_choice_candidates(options) == (" A", " B", " C")


def test_twenty_six_options_reach_z():
    assert multiple_choice_candidates(["x"] * 26)[-1] == " Z"


@pytest.mark.parametrize("count", [0, 1, 27])
def test_number_of_options(count):
    with pytest.raises(ValueError, match=f"has {count} options; expected 2 to 26"):
        multiple_choice_prompt("Q", ["x"] * count)


def test_classification():
    assert classification_prompt(" do i need a visa\n", ["bank", "small talk", "travel"]) == (
        "Topics: bank, small talk, travel\n\nMessage: do i need a visa\nTopic:"
    )
