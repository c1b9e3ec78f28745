"""Tasks: questions with a fixed list of answers, from a data file to a model's score for each answer."""

from ldmole_ds.tasks.benchmarks import TASKS, Task, load_task, tasks_of
from ldmole_ds.tasks.collate import MODEL_KEYS, ChoiceCollator, padding_id
from ldmole_ds.tasks.demo import arc_files, demo_files, demo_model_file
from ldmole_ds.tasks.item import SCORINGS, Item, Question
from ldmole_ds.tasks.labels import LabelSet
from ldmole_ds.tasks.prompt import classification_prompt, multiple_choice_candidates, multiple_choice_prompt
from ldmole_ds.tasks.rows import DataError
from ldmole_ds.tasks.schema import labels_from_rows, questions_from_rows, read_labels, read_questions
from ldmole_ds.tasks.scoring import accuracy, score_candidates, score_candidates_reference
from ldmole_ds.tasks.tokenize import ChoiceDataset, EncodedQuestion, encode_question

__all__ = [
    "MODEL_KEYS",
    "ChoiceCollator",
    "ChoiceDataset",
    "DataError",
    "EncodedQuestion",
    "LabelSet",
    "Item",
    "Question",
    "SCORINGS",
    "TASKS",
    "Task",
    "accuracy",
    "arc_files",
    "classification_prompt",
    "demo_files",
    "demo_model_file",
    "encode_question",
    "labels_from_rows",
    "load_task",
    "multiple_choice_candidates",
    "multiple_choice_prompt",
    "padding_id",
    "questions_from_rows",
    "read_labels",
    "read_questions",
    "score_candidates",
    "score_candidates_reference",
    "tasks_of",
]
