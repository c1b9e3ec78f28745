"""An adapter inside lm-evaluation-harness: one of its own task types, on local rows, gives our scores and answers."""

import json

import pytest
import torch

from ldmole_ds import LDMoLEConfig, get_ldmole_model
from ldmole_ds.model.base_model import load_base_model
from ldmole_ds.tasks import TASKS, ChoiceDataset, load_task, score_candidates_reference
from ldmole_ds.tasks.adapted_model import load_adapted
from tests.launcher import ROOT
from tests.tiny import wake_experts

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[lm_eval]'")

TASK = """
task: local_rows
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def adapter(tiny_model_folder, tmp_path_factory):
    """An adapter whose experts all say something, with the name of its base model."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LDMoLEConfig(
        num_experts=4, r=2, lambda_hidden_size=8, base_model_name_or_path=str(tiny_model_folder), lora_dropout=0.0
    )
    model = get_ldmole_model(load_base_model(str(tiny_model_folder)), config)
    wake_experts(model, std=1.0)
    model.save_pretrained(folder)
    return folder


def evaluated(model, folder, questions):
    """The harness's results on our questions: accuracy, and the log-likelihoods of each question's options."""
    from lm_eval.tasks import TaskManager

    rows = [{"prompt": q.prompt, "options": list(q.candidates), "gold": q.gold} for q in questions]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(TASK.format(rows=folder / "rows.jsonl", cache=folder / "cache"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, tasks=["local_rows"], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    samples = sorted(results["samples"]["local_rows"], key=lambda sample: sample["doc_id"])
    return results["results"]["local_rows"]["acc,none"], [
        [float(response[0][0]) for response in sample["resps"]] for sample in samples
    ]


def test_the_harness_scores_an_adapter_as_we_do(adapter, tiny_model_folder, tmp_path):
    from ldmole_ds.tasks.lm_eval_model import LDMoLELM

    questions = load_task(TASKS["arc_easy"], "test", data_dir=ROOT / "tests" / "tasks" / "benchmark_rows")
    accuracy, scores = evaluated(LDMoLELM(adapter, batch_size=4, device="cpu"), tmp_path, questions)
    model, tokenizer = load_adapted(adapter)
    data = ChoiceDataset.from_questions(questions, tokenizer, 2048)
    with torch.no_grad():
        expected = [score_candidates_reference(model, question) for question in data.questions]
        base, _ = load_adapted(None, str(tiny_model_folder))
        without = [score_candidates_reference(base, question) for question in data.questions]
    for found, ours, bare in zip(scores, expected, without, strict=True):
        torch.testing.assert_close(torch.tensor(found), ours, atol=1e-3, rtol=1e-4)
        assert (torch.tensor(found) - bare).abs().max() > 0.1  # the adapter is in it
    right = [int(score.argmax()) == q.gold for score, q in zip(expected, data.questions, strict=True)]
    assert accuracy == pytest.approx(sum(right) / len(right))


def test_the_harness_makes_it_by_name_from_its_command_line(adapter):
    from lm_eval.api.registry import get_model

    from ldmole_ds.tasks.lm_eval_model import LDMoLELM

    # What `--model_args adapter=...` becomes; the command line adds its own device.
    given = {"batch_size": 1, "max_batch_size": None, "device": "cuda"}
    model = get_model("ldmole").create_from_arg_obj({"adapter": str(adapter)}, given)
    assert isinstance(model, LDMoLELM)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
