"""Every benchmark: its prompts word by word, its right answers, the rows it refuses, and the tokens they become."""

import json
import string
from pathlib import Path

import pytest

from ldmole_ds.tasks import (
    SCORINGS,
    TASKS,
    DataError,
    demo_files,
    encode_question,
    load_task,
    read_labels,
    read_questions,
    tasks_of,
)
from ldmole_ds.tasks.benchmarks.mmlu_pro import carve
from ldmole_ds.tasks.rows import Row

ROWS = Path(__file__).parent / "benchmark_rows"
PAPER = [name for name in TASKS if name != "clinc_domains"]

# Row of the held-out split; what stands above the letters; the cloze prompt; the options; the right one.
KNOWN = {
    "arc_challenge": (
        1,
        "Copper is an element that is used in electrical wires. What is the smallest unit of copper that still "
        "maintains the characteristics of copper?",
        "Copper is an element that is used in electrical wires. What is the smallest unit of copper that still "
        "maintains the characteristics of copper?\nAnswer:",
        ("the atom", "the electron", "the nucleus", "the proton"),
        0,
    ),
    "arc_easy": (
        3,  # labelled 1 to 4 in the data
        "All living and nonliving material is composed of",
        "All living and nonliving material is composed of\nAnswer:",
        ("air", "elements", "water", "soil"),
        1,
    ),
    "openbookqa": (
        1,
        "Which of these gives off its own light?",
        "Which of these gives off its own light?\nAnswer:",
        ("a mirror", "the moon", "a candle flame", "a white wall"),
        2,
    ),
    "commonsense_qa": (
        1,
        "Where would you find magazines along side many other printed works?",
        "Where would you find magazines along side many other printed works?\nAnswer:",
        ("doctor", "bookstore", "market", "train station", "mortuary"),
        1,
    ),
    "swag": (
        0,
        "Students lower their eyes nervously. She\nWhich ending is the most likely?",
        "Students lower their eyes nervously. She",
        (
            "pats her shoulder, then saunters toward someone.",
            "turns with two students.",
            "walks slowly towards someone.",
            "wheels around as her dog thunders out.",
        ),
        2,
    ),
    "hellaswag": (
        5,  # from WikiHow, with marks of its layout
        "Pets and Animals: How to choose a water dish for your rabbit. Avoid plastic bowls. Your rabbit's bowl should "
        "be made of ceramic or metal. Plastic bowls are easily scratched.\nWhich ending is the most likely?",
        "Pets and Animals: How to choose a water dish for your rabbit. Avoid plastic bowls. Your rabbit's bowl should "
        "be made of ceramic or metal. Plastic bowls are easily scratched.",
        (
            "Choose a soft surface for your rabbit to hide in. Rabbits like to hide on soft, fluffy surfaces.",
            "The bottom of a plastic or metal bowl can be damaged, so make sure that your rabbit is not using them. "
            "Plastic bowls are safe for humans and are easy to clean out and replace.",
            "Bacteria can then build up in the crevices and contaminate the water. Your rabbit may also pick up a "
            "plastic bowl and treat it as a toy.",
            "Instead, use a stainless steel bowl to reduce scratching on your rabbit's paws. Provide a water bowl for "
            "your bunny.",
        ),
        2,
    ),
    "mmlu_pro": (
        2,
        "What is 7% equal to?",
        "What is 7% equal to?\nAnswer:",
        ("0.0007", "700", "0.007", "0.007%", "0.7", "0.7%", "7", "70", "7%", "0.07"),
        9,
    ),
    "cola": (
        1,
        "Sentence: The children has eating their soup.\nIs this sentence acceptable English?",
        "Sentence: The children has eating their soup.\nIs this sentence acceptable English?\nAnswer:",
        ("no", "yes"),
        0,
    ),
    "rte": (
        0,
        "Text: The old bridge was closed in May after engineers found cracks in its pillars.\n"
        "Claim: The bridge had cracks in its pillars.\nDoes the claim follow from the text?",
        "Text: The old bridge was closed in May after engineers found cracks in its pillars.\n"
        "Claim: The bridge had cracks in its pillars.\nDoes the claim follow from the text?\nAnswer:",
        ("yes", "no"),
        0,
    ),
    "clinc_domains": (
        0,
        "Message: can my credit limit be increased to $1000\nWhich topic is it about?",
        "Topics: car, banking, credit, home, food, assistant, chat, travel, utility, work\n\n"
        "Message: can my credit limit be increased to $1000\nTopic:",
        ("car", "banking", "credit", "home", "food", "assistant", "chat", "travel", "utility", "work"),
        2,
    ),
}
LABEL_WORDS = {"cola", "rte", "clinc_domains"}


def held_out(name, scoring=None):
    return load_task(TASKS[name], TASKS[name].heldout_split, data_dir=ROWS, scoring=scoring)


def refused(name, row):
    with pytest.raises(DataError) as caught:
        TASKS[name].read(Row("file:1", row))
    assert str(caught.value).startswith("file:1: ")
    return str(caught.value)


def row_of(name):
    task = TASKS[name]
    return json.loads((ROWS / name / f"{task.heldout_split}.jsonl").read_text(encoding="utf-8").splitlines()[0])


@pytest.mark.parametrize("name", TASKS)
def test_prompts_word_by_word(name):
    index, question, cloze, options, gold = KNOWN[name]
    letters = string.ascii_uppercase[: len(options)]
    by_letters = held_out(name, "letters")[index]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    assert by_letters.prompt == "\n".join([question, *lines, "Answer:"])
    assert by_letters.candidates == tuple(f" {letter}" for letter in letters)
    by_text = held_out(name, "cloze")[index]
    assert (by_text.prompt, by_text.candidates) == (cloze, tuple(f" {option}" for option in options))
    assert (by_letters.gold, by_text.gold) == (gold, gold)
    assert (by_letters.task, by_text.task) == (name, name)
    assert by_letters.lengths is None
    assert by_text.lengths == (None if name in LABEL_WORDS else tuple(map(len, options)))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("name", PAPER)
def test_every_row_of_every_split_is_a_question(name, scoring):
    for split in ("train", TASKS[name].heldout_split):
        questions = load_task(TASKS[name], split, data_dir=ROWS, scoring=scoring)
        assert len(questions) == 6 and len({question.prompt for question in questions}) >= 3
        assert all(0 <= question.gold < len(question.candidates) for question in questions)
    assert len(load_task(TASKS[name], "train", data_dir=ROWS, scoring=scoring, limit=2)) == 2


def test_options_are_as_many_as_the_row_has():
    counts = {name: sorted({len(question.candidates) for question in held_out(name)}) for name in TASKS}
    assert counts["arc_easy"] == [3, 4, 5] and counts["mmlu_pro"] == [3, 4, 7, 10]
    assert counts["commonsense_qa"] == [5] and counts["cola"] == counts["rte"] == [2]
    assert [q.gold for q in held_out("cola")] == [1, 0, 1, 0, 1, 0]
    assert [q.gold for q in held_out("rte")] == [0, 1, 0, 1, 0, 1]


def test_one_text_twice_is_right_twice():
    """`mortal` is option A and option E, which is the answer: by its text A is as right."""
    letters, cloze = held_out("commonsense_qa", "letters")[5], held_out("commonsense_qa", "cloze")[5]
    assert cloze.candidates[0] == cloze.candidates[4] == " mortal"
    assert (letters.gold, cloze.gold) == (4, 0)


def test_the_papers_protocol():
    multiple_choice = [name for name in PAPER if name not in ("cola", "rte")]
    assert {TASKS[name].label_smoothing for name in multiple_choice} == {0.1}
    assert {TASKS[name].scoring for name in PAPER} == {"letters"}
    assert {name: task.metric for name, task in TASKS.items() if task.metric} == {"cola": "matthews_correlation"}
    on_test = {name for name, task in TASKS.items() if task.heldout_split == "test"}
    assert on_test == {"arc_challenge", "arc_easy", "openbookqa", "mmlu_pro", "clinc_domains"}
    assert TASKS["arc_easy"].hub == ("allenai/ai2_arc", "ARC-Easy") and TASKS["cola"].hub == ("nyu-mll/glue", "cola")


def test_clinc_domains_is_what_the_demo_trains_on():
    files = demo_files()
    words = json.loads(files["labels"].read_text(encoding="utf-8"))
    for split in ("train", "validation", "test"):
        of_file = read_questions(files[split], labels=read_labels(files["train"]), label_words=words)
        of_task = load_task(TASKS["clinc_domains"], split)
        assert [(q.prompt, q.candidates, q.gold) for q in of_file] == [
            (q.prompt, q.candidates, q.gold) for q in of_task
        ]
        assert of_task[0].lengths is None
    row = Row("file:1", {"text": "hi", "domain": "small_talk"})
    assert TASKS["clinc_domains"].read(row).gold == 6


@pytest.mark.parametrize("tokenizer_name", ["gpt2_tokenizer", "llama_tokenizer", "eos_tokenizer"])
@pytest.mark.parametrize("name", TASKS)
def test_truncation_never_cuts_the_answer(name, tokenizer_name, request):
    """No tokenizer here has a chat template; prompts are plain text and lose their beginning."""
    tokenizer = request.getfixturevalue(tokenizer_name)
    assert tokenizer.chat_template is None
    for scoring in SCORINGS:
        for question in held_out(name, scoring)[:6]:
            whole = encode_question(tokenizer, question, 4096)
            longest = max(map(len, whole.candidate_ids))
            cut = encode_question(tokenizer, question, longest + 6)
            assert cut.candidate_ids == whole.candidate_ids and cut.gold == whole.gold
            assert len(cut.prompt_ids) + longest == longest + 6 and cut.num_cut_tokens > 0
            # Byte-level tokenizers put nothing of their own before the text; what is left is its end.
            assert cut.prompt_ids[-5:] == whole.prompt_ids[-5:]
            if scoring == "letters":
                assert len(set(cut.candidate_ids)) == len(question.candidates)


@pytest.mark.parametrize(
    ("name", "column", "absent"),
    [
        *((name, "answerKey", "") for name in ("arc_challenge", "arc_easy", "openbookqa", "commonsense_qa")),
        *((name, "label", -1) for name in ("swag", "cola", "rte")),
        ("hellaswag", "label", ""),
    ],
)
def test_rows_whose_answers_are_not_published(name, column, absent):
    message = refused(name, {**row_of(name), column: absent})
    assert f"the row has no answer ({column!r} is {absent!r}); expected a split whose answers are published" in message


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("swag", {"label": 4}, "'label' is 4; expected the index of an option, 0 to 3"),
        ("swag", {"label": True}, "'label' is True; expected the index"),
        ("swag", {"ending2": ""}, "ending 2 is empty"),
        ("swag", {"startphrase": 3}, "'startphrase' is of type int; expected a string"),
        ("hellaswag", {"endings": ["a", "b"]}, "'endings' has the wrong form; expected a list of 4 strings"),
        ("hellaswag", {"endings": ["a", "b", "c", 4]}, "ending 3 is of type int"),
        ("hellaswag", {"label": "x"}, "'label' is 'x'; expected the index of an option, 0 to 3"),
        ("mmlu_pro", {"options": ["a"]}, "'options' has the wrong form; expected a list of 2 to 26 strings"),
        ("mmlu_pro", {"answer_index": 10}, "'answer_index' is 10; expected the index of an option, 0 to 9"),
        ("cola", {"label": 2}, "'label' is 2; expected the index of an option, 0 to 1"),
        ("cola", {"label": 0.0}, "'label' is 0.0; expected the index"),
        ("rte", {"sentence2": " "}, "the sentence is empty"),
        ("arc_easy", {"answerKey": "9"}, "answerKey '9' is not among the option labels; expected 'A', 'B', 'C', 'D'"),
    ],
)
def test_rows_that_do_not_fit(name, change, said):
    assert said in refused(name, {**row_of(name), **change})


@pytest.mark.parametrize("name", PAPER)
def test_a_missing_column_is_named_with_the_schema(name):
    row = row_of(name)
    for column in ("label", "answerKey", "answer_index"):
        if column in row:
            message = refused(name, {key: value for key, value in row.items() if key != column})
            assert f"no key {column!r}; expected {{" in message


def test_an_unknown_domain():
    assert "domain 'sports' is not among the option labels" in refused(
        "clinc_domains", {"text": "hi", "domain": "sports"}
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("arc_eazy", r"--task 'arc_eazy' is not known: did you mean arc_easy\? choose among arc_challenge"),
        ("cola,cola", r"--task names cola twice: name each task once, and weigh them with --mixture"),
        ("", r"--task '' is not known: choose among"),
    ],
)
def test_task_lists_that_do_not_work(names, said):
    with pytest.raises(DataError, match=said):
        tasks_of(names)


def test_task_lists():
    assert [task.name for task in tasks_of("rte, cola")] == ["rte", "cola"]


def test_a_split_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"swag/test\.jsonl does not exist; the folder has train, validation"):
        load_task(TASKS["swag"], "test", data_dir=ROWS)
    with pytest.raises(DataError, match=r"does not exist; expected <data_dir>/<task>/<split>\.jsonl"):
        load_task(TASKS["swag"], "test", data_dir=tmp_path)
    with pytest.raises(DataError, match="has no split 'dev': use train, validation or test"):
        load_task(TASKS["clinc_domains"], "dev")
    with pytest.raises(DataError, match=r"--scoring 'words' is not known: use letters or cloze"):
        load_task(TASKS["swag"], "train", data_dir=ROWS, scoring="words")


def test_a_hub_that_cannot_be_reached_says_what_to_do():
    with pytest.raises(DataError, match=r"--task rte: hub dataset 'nyu-mll/glue', split 'train', .*or --data_dir"):
        load_task(TASKS["rte"], "train")


def test_mmlu_pro_is_carved_by_the_question():
    rows = [{"question": f"question {n // 2}", "number": n} for n in range(2000)]
    parts = {split: carve(rows, split) for split in ("train", "validation", "test")}
    assert sorted(row["number"] for part in parts.values() for row in part) == list(range(2000))
    assert [len(part) for part in parts.values()] == [1188, 198, 614]
    assert not {r["question"] for r in parts["train"]} & {r["question"] for r in parts["test"]}
    with pytest.raises(DataError, match="task mmlu_pro has no split 'dev'"):
        carve(rows, "dev")


@pytest.mark.parametrize(
    ("split", "rows"), [("train[2:4]", slice(2, 4)), ("train[:-1]", slice(None, -1)), ("train[-2:]", slice(-2, None))]
)
def test_a_part_of_a_split_by_row_numbers(split, rows):
    everything = load_task(TASKS["rte"], "train", data_dir=ROWS)
    assert load_task(TASKS["rte"], split, data_dir=ROWS) == everything[rows]
    assert load_task(TASKS["rte"], split, data_dir=ROWS, limit=1) == everything[rows][:1]


@pytest.mark.parametrize(
    ("split", "said"), [("train[:10%]", "such as train\\[:-300\\]"), ("train[50:]", "'train\\[50:\\]' has no rows")]
)
def test_a_part_that_is_none(split, said):
    with pytest.raises(DataError, match=said):
        load_task(TASKS["rte"], split, data_dir=ROWS)
