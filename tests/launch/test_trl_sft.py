"""examples/trl_sft.py: TRL's SFTTrainer trains the same adapter whether experts are partitioned or not."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch

from ldmole_ds import LDMoLEConfig, LDMoLEModel, get_ldmole_model
from ldmole_ds.model.adapter_io import read_state
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from tests.launcher import launch
from tests.tiny import ragged_batch, wake_experts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL: pip install trl")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STEPS, TOLERANCE = 4, 1e-5


@pytest.fixture(scope="module")
def chat_model(tiny_model_folder, tmp_path_factory):
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model_folder, folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(chat_model, data_folder, tmp_path_factory):
    """ep_size 1 and 2 on two ranks, the same rows in the same order."""
    folder = tmp_path_factory.mktemp("sft")
    rows = [json.loads(line) for line in (data_folder / "train.jsonl").read_text().splitlines()]
    with open(folder / "chats.jsonl", "w") as file:
        for row in rows:
            messages = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]
            file.write(json.dumps({"messages": messages}) + "\n")
    for ep_size in (1, 2):
        flags = {
            "model_name_or_path": chat_model,
            "train_file": folder / "chats.jsonl",
            "output_dir": folder / str(ep_size),
            "ep_size": ep_size,
            "max_steps": STEPS,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
        }
        result = launch(*[part for k, v in flags.items() for part in (f"--{k}", v)], script="examples/trl_sft.py")
        assert result.returncode == 0, result.stdout[-4000:]
        assert result.stdout.count("exits successfully") == 2
    return folder


@pytest.mark.slow
def test_losses_norms_and_weights_do_not_depend_on_ep_size(runs):
    logs = [json.loads((runs / ep / "trainer_state.json").read_text())["log_history"] for ep in ("1", "2")]
    for name in ("loss", "grad_norm", "cross_entropy_loss", "load_balancing_loss"):
        one, two = ([row[name] for row in log if name in row] for log in logs)
        assert len(one) == STEPS and two == pytest.approx(one, rel=TOLERANCE), name
    one, two = (read_state(runs / ep / "adapter_model.safetensors") for ep in ("1", "2"))
    assert one.keys() == two.keys()
    for key, expected in one.items():
        assert (two[key] - expected).norm() <= TOLERANCE * expected.norm(), key


@pytest.mark.slow
def test_the_adapter_has_all_experts_and_loads_in_one_process(runs, chat_model):
    state = read_state(runs / "2" / "adapter_model.safetensors")
    updates = [value for key, value in state.items() if key.endswith("lora_B")]
    assert updates and all(len(value) == 8 and value.flatten(1).norm(dim=1).min() > 0 for value in updates)
    model = LDMoLEModel.from_pretrained(load_base_model(str(chat_model)), runs / "2")
    with torch.no_grad():
        assert not torch.equal(
            model(**ragged_batch()).logits, load_base_model(str(chat_model))(**ragged_batch()).logits
        )


def test_padding_free_rows_do_not_see_each_other(chat_model, tmp_path):
    """Two rows laid end to end are told apart by their positions alone."""
    from datasets import Dataset
    from trl import SFTConfig

    from examples.trl_sft import LDMoLESFTTrainer

    config = LDMoLEConfig(lora_dropout=0.0, lambda_hidden_size=16)
    model = get_ldmole_model(load_base_model(str(chat_model), attn_implementation="eager"), config)
    wake_experts(model)
    args = SFTConfig(str(tmp_path), padding_free=True, max_length=None, use_cpu=True, bf16=False, report_to="none")
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8, 9, 10]}, {"input_ids": [90, 91, 92]}])
    trainer = LDMoLESFTTrainer(model, args, train_dataset=rows, processing_class=load_tokenizer(str(chat_model)))
    model.eval()
    with torch.no_grad():
        packed = trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset)))
        alone = [model(input_ids=(ids := torch.tensor([row["input_ids"]])), labels=ids).loss for row in rows]
    assert packed.item() == pytest.approx((5 * alone[0] + 2 * alone[1]).item() / 7, rel=1e-5)
