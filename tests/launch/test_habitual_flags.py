"""Flags that people pass from habit: they act where they are meant to, and nowhere else."""

import json

import pytest
from safetensors.torch import load_file

from ldmole_ds.training.arguments import parse_flags
from ldmole_ds.training.run import train
from ldmole_ds.training.runtime import UserError
from ldmole_ds.training.setup import accelerator_config


@pytest.fixture
def run(tiny_model_folder, data_folder, tmp_path):
    """Trains for two steps in this process; gives the run's folder."""

    def _run(*flags, name="out"):
        files = [f"--train_file={data_folder / 'train.jsonl'}", f"--validation_file={data_folder / 'test.jsonl'}"]
        small = ["--num_experts=4", "--lambda_hidden_size=8", "--per_device_train_batch_size=2", "--save_strategy=no"]
        folder = tmp_path / name
        common = [f"--model_name_or_path={tiny_model_folder}", f"--output_dir={folder}", "--max_steps=2"]
        train(parse_flags([*common, *files, *small, *flags]))
        return folder

    return _run


def test_flags_of_training_and_evaluation_leave_the_results_whole(run):
    plain = run("--learning_rate=0.01")
    flags = ["--dataloader_drop_last=True", "--per_device_eval_batch_size=2", "--eval_do_concat_batches=False"]
    odd = run("--learning_rate=0.01", "--bf16_full_eval=True", *flags, name="odd")
    # Every held-out row is answered, although three are no multiple of two.
    answers = json.loads((odd / "heldout_answers.json").read_text())
    assert (
        answers["gold"] == json.loads((plain / "heldout_answers.json").read_text())["gold"]
        and len(answers["gold"]) == 3
    )
    # An evaluation in bfloat16 does not round what is saved.
    expected, saved = (load_file(folder / "adapter_model.safetensors") for folder in (plain, odd))
    assert all(saved[name].equal(value) for name, value in expected.items())


def test_rows_are_grouped_by_length(run):
    assert (run("--train_sampling_strategy=group_by_length") / "report.json").is_file()


def test_an_optimizer_that_checkpoints_cannot_hold_is_named(run):
    with pytest.raises(UserError, match="Adafactor keeps .*checkpoints cannot hold: use --optim adamw_torch"):
        run("--optim=adafactor", "--save_strategy=steps")


def test_the_accelerators_settings_go_with_deepspeed(tmp_path):
    state = {"use_configured_state": True}
    assert accelerator_config(None) == state
    assert accelerator_config('{"split_batches": true}') == {"split_batches": True, **state}
    (tmp_path / "a.json").write_text('{"even_batches": false}')
    assert accelerator_config(str(tmp_path / "a.json")) == {"even_batches": False, **state}
    for wrong in ("[1]", "{", '{"split_batch": true}', str(tmp_path / "b.json")):
        with pytest.raises(ValueError, match="--accelerator_config .*give a JSON object"):
            accelerator_config(wrong)
