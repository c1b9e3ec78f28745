"""Fine-tuning on packed rows: two ranks with partitioned experts train and evaluate as one process, and as unpacked."""

from __future__ import annotations

import math
import tempfile

import pytest
import torch

from tests.distributed_utils import run_distributed
from tests.tiny import tiny_model
from tests.training.trainer_runs import train

STEPS, TOLERANCE = 2, 1e-5
LENGTHS = (5, 11, 3, 9, 2, 7, 4, 12, 6, 8, 5, 10, 3, 12, 7, 4)


class Rows(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def documents():
    from ldmole_ds.tasks.sft.encode import Document

    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Document(tuple(ids), ((max(1, len(ids) // 2), len(ids)),)) for ids in rows]


def make_trainer(layout: str, micro: int, ds_config: dict | None = None, ep_size: int = 1):
    """Eight documents a step in the same order: eight rows of one, or four rows of two."""
    from torch.utils.data import SequentialSampler

    from ldmole_ds.tasks.sft.collate import DocumentCollator, PackedCollator
    from ldmole_ds.training.argument_groups import LDMoLETrainingArguments
    from ldmole_ds.training.packing_check import PackingCheckCallback
    from ldmole_ds.training.sft import SFTLossTrainer

    class InOrder(SFTLossTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    single = documents()
    collator, rows = DocumentCollator(0), single
    if layout != "unpacked":
        collator = PackedCollator(0, one_row=layout == "one row")
        rows = [single[i : i + 2] for i in range(0, len(single), 2)]
    values = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": 3,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "eval_on_start": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    if ds_config is not None:
        values |= {"deepspeed": ds_config, "accelerator_config": {"use_configured_state": True}}
    return InOrder(
        tiny_model(ep_size=ep_size),
        LDMoLETrainingArguments(**values),
        train_dataset=Rows(rows),
        eval_dataset=Rows(single[:7]),
        data_collator=collator,
        eval_collator=DocumentCollator(0),
        callbacks=[PackingCheckCallback(collator)] if layout != "unpacked" else [],
    )


def trained(trainer) -> dict:
    found = train(trainer)
    logs = [row for row in trainer.state.log_history if "grad_norm" in row]
    found["auxiliary"] = [row[f"{n}_loss"] for row in logs for n in ("cross_entropy", "sparsity", "load_balancing")]
    return {**found, "evaluation": trainer.evaluate()}


def on_ranks(rank: int, world_size: int, cases: list[tuple]) -> list[dict]:
    import os

    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    results = []
    for layout, micro, stage in cases:
        AcceleratorState._reset_state()
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        results.append(trained(make_trainer(layout, micro, config, ep_size=2)))
    return results


def assert_same(found: dict, expected: dict) -> None:
    for name in ("losses", "norms"):
        assert found[name] == pytest.approx(expected[name], rel=TOLERANCE)
    # Logged with six digits.
    assert found["auxiliary"] == pytest.approx(expected["auxiliary"], abs=3e-6)
    for name in ("eval_loss", "eval_perplexity"):
        assert found["evaluation"][name] == pytest.approx(expected["evaluation"][name], rel=TOLERANCE)
    for key, value in expected["state"].items():
        difference = (found["state"][key] - value).norm() / value.norm().clamp(min=1e-12)
        assert difference < TOLERANCE, f"{key} differs by {difference:.1e}"


@pytest.fixture(scope="module")
def unpacked():
    """One process, eight rows of one document a step."""
    trainer = make_trainer("unpacked", 8)
    return trainer.model, trained(trainer)


def test_packed_training_is_unpacked_training(unpacked):
    for layout in ("rows", "one row"):
        assert_same(trained(make_trainer(layout, 4)), unpacked[1])


def test_perplexity_is_that_of_all_answer_tokens(unpacked):
    model, found = unpacked
    total, count = 0.0, 0
    for document in documents()[:7]:
        ids, labels = torch.tensor([document.input_ids]), torch.tensor([document.labels])
        number = int(labels[:, 1:].ne(-100).sum())
        with torch.no_grad():
            total += model.eval()(input_ids=ids, labels=labels).loss.item() * number
        count += number
    assert found["evaluation"]["eval_loss"] == pytest.approx(total / count, rel=TOLERANCE)
    assert found["evaluation"]["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=TOLERANCE)


@pytest.mark.distributed
def test_two_ranks_with_partitioned_experts_train_packed_rows_as_one_process(unpacked):
    cases = [("rows", 2, 2), ("one row", 2, 3)]
    for results in run_distributed(on_ranks, 2, cases, deepspeed=True, timeout_s=240):
        for found in results:
            assert_same(found, unpacked[1])
