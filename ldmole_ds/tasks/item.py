"""A question with its options, and the two ways to put it to a model.

* `letters`: the options are lettered in the prompt and the letters are scored; the evaluation protocol of LD-MoLE
  (arXiv 2509.25684).
* `cloze`: the prompt has no options and the text of each option is scored as its continuation.

The log-probability of an option's text falls with its length, so cloze divides it by the option's number of
characters, which no tokenizer changes. Words that label a class (yes and no, topics) are the same for every row of a
task and are not divided.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldmole_ds.tasks.prompt import multiple_choice_candidates, multiple_choice_prompt

SCORINGS = ("letters", "cloze")


@dataclass(frozen=True)
class Question:
    """A prompt and the continuations among which a model must find the right one.

    Attributes:
        prompt: Text up to the answer.
        candidates: The possible continuations, each with its leading space.
        gold: Index of the right candidate.
        lengths: What each candidate's log-probability is divided by; None: by nothing.
        task: Name of the task that the question belongs to, empty for rows of one's own.
    """

    prompt: str
    candidates: tuple[str, ...]
    gold: int
    lengths: tuple[int, ...] | None = None
    task: str = ""


@dataclass(frozen=True)
class Item:
    """What a row of a benchmark says, before it is put into a prompt.

    Attributes:
        question: Text above the lettered options.
        cloze: Text that an option continues.
        options: Their texts, in the order of the row.
        gold: Index of the right option.
        labels_a_class: Whether options are the words of a fixed set of classes, not texts of this row.
    """

    question: str
    cloze: str
    options: tuple[str, ...]
    gold: int
    labels_a_class: bool = False

    def as_question(self, scoring: str, task: str = "") -> Question:
        """The prompt and its candidates.

        Args:
            scoring: One of `SCORINGS`.
            task: Name of the task.
        """
        if scoring == "letters":
            prompt = multiple_choice_prompt(self.question, self.options)
            return Question(prompt, multiple_choice_candidates(self.options), self.gold, task=task)
        options = [option.strip() for option in self.options]
        lengths = None if self.labels_a_class else tuple(map(len, options))
        # Some rows have one text twice: both are right then, and the first of equal scores is the answer.
        gold = options.index(options[self.gold])
        return Question(self.cloze, tuple(f" {option}" for option in options), gold, lengths, task)
