"""A training checkpoint stands for its adapter: it loads, exports and starts a run, without its pickles being read."""

import pytest
import torch

from ldmole_ds.checkpoint import STATE_FOLDER, save_folder
from ldmole_ds.model import LDMoLEModel, ldmole_param_groups
from ldmole_ds.model.export import export_adapter
from ldmole_ds.model.training_state import save_state
from ldmole_ds.training.adapter_start import start_from_adapter
from ldmole_ds.training.arguments import parse_flags
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model


def logits(model):
    with torch.no_grad():
        return model.eval()(**ragged_batch()).logits


def checkpoint(folder, **changes):
    """After one step of AdamW; with files that are no pickles where the Trainer has some."""
    model = tiny_model(tiny_config(base_model_name_or_path="acme/base", **changes))
    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=1e-2)
    model.train()(**ragged_batch()).loss.backward()
    optimizer.step()

    def write(staging):
        written = save_state(model, optimizer, staging)
        for name in ("rng_state.pth", "scheduler.pt"):
            (staging / name).write_bytes(b"no pickle")
        return written

    save_folder(folder, write)
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"router": "relu"}, {"router": "lora"}, {"lambda_sharing": "per_layer", "modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_a_checkpoint_loads_and_exports_as_its_adapter(tmp_path, changes):
    folder = tmp_path / "checkpoint-1"
    model = checkpoint(folder, **changes)
    assert not (folder / "adapter_model.safetensors").exists()
    expected = logits(model)
    assert torch.equal(logits(LDMoLEModel.from_pretrained(tiny_llama(), folder)), expected)
    export_adapter(folder, tmp_path / "out")
    loaded = LDMoLEModel.from_pretrained(tiny_llama(), tmp_path / "out")
    assert torch.equal(logits(loaded), expected)
    if model.adaptive_l1 is not None:
        assert int(model.adaptive_l1.exponent) == int(loaded.adaptive_l1.exponent) != 0
    config, state = start_from_adapter(parse_flags(["--adapter_name_or_path", str(folder)]))
    assert config.router == model.adapter_config.router and len(state) > 14


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "checkpoint-1"
    checkpoint(folder)
    shard = next((folder / STATE_FOLDER).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    for use in (
        lambda: LDMoLEModel.from_pretrained(tiny_llama(), folder),
        lambda: export_adapter(folder, tmp_path / "out"),
        lambda: start_from_adapter(parse_flags(["--adapter_name_or_path", str(folder)])),
    ):
        with pytest.raises(
            ValueError, match=r"checkpoint-1 is damaged: .*its checksum differs.*use another checkpoint"
        ):
            use()
    assert not (tmp_path / "out").exists()


def test_weights_that_became_nan_are_refused(tmp_path):
    model = tiny_model(tiny_config(base_model_name_or_path="acme/base"))
    with torch.no_grad():
        model.input_groups[2].lora_A[0, 1, 2, 3] = float("nan")
    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=1e-2)
    save_folder(tmp_path / "checkpoint-1", lambda staging: save_state(model, optimizer, staging))
    with pytest.raises(ValueError, match=r"lora_A holds NaN or infinite values: take an earlier checkpoint"):
        LDMoLEModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-1")
