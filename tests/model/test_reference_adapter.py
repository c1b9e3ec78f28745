"""Adapters in the authors' key layout, written here from a wrapped model and read into another one."""

import traceback

import pytest
import torch
from safetensors.torch import save_file

from ldmole_ds.model import get_ldmole_model
from tests.model.authors_keys import authors_state
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def logits(model):
    return model.eval()(**ragged_batch()).logits


@pytest.mark.parametrize("form", ["state", "safetensors", "bin"])
def test_same_logits_from_every_form(tmp_path, form):
    model = tiny_model()
    source = authors_state(model)
    if form == "safetensors":
        save_file(source, tmp_path / "adapter.safetensors")
        source = tmp_path / "adapter.safetensors"
    elif form == "bin":
        torch.save(source, tmp_path / "adapter.bin")
        source = str(tmp_path / "adapter.bin")
    other = get_ldmole_model(tiny_llama(), tiny_config(), seed=99)
    assert not torch.equal(logits(other), logits(model))
    other.load_reference_adapter(source)
    assert torch.equal(logits(other), logits(model))


def test_local_lambda_mlps():
    config = {"lambda_sharing": "per_layer", "input_groups": "single"}
    model = tiny_model(tiny_config(**config))
    state = authors_state(model)
    other = get_ldmole_model(tiny_llama(), tiny_config(**config), seed=99)
    other.load_reference_adapter(state)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="lambda MLP differs under .*lambda_sharing='per_layer'"):
        tiny_model().load_reference_adapter(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{Q_PROJ}.lora_A7.weight"), r"lacks .*q_proj\.lora_A7\.weight"),
        (lambda state: state.pop(f"{Q_PROJ}.lora_route.weight"), r"lacks .*q_proj\.lora_route\.weight"),
        (lambda state: state.update({f"{Q_PROJ}.lora_A8.weight": torch.zeros(4, 64)}), r"holds .*lora_A8.*no place"),
        (lambda state: state.update({"lm_head.lora_route.weight": torch.zeros(8, 64)}), r"holds .*lm_head.*no place"),
        (lambda state: state.update({f"{Q_PROJ}.lora_route.weight": torch.zeros(9, 64)}), r"shape \(9, 64\), expected"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    model = tiny_model()
    state = authors_state(model)
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_reference_adapter(state)


class Payload:
    def __reduce__(self):
        return (print, ("code from a file",))


def refused(path):
    with pytest.raises(ValueError) as raised:
        tiny_model().load_reference_adapter(path)
    message = str(raised.value)
    assert message.startswith(str(path)) and "\n" not in message and ".safetensors" in message
    # Torch's own message advises to unpickle everything.
    assert "UnpicklingError" not in "".join(traceback.format_exception(raised.value))
    return message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"weights": p}, lambda p: {p: torch.zeros(1)}])
def test_pickled_code_is_never_run(tmp_path, capsys, zipped, wrap):
    path = tmp_path / "adapter.bin"
    torch.save(wrap(Payload()), path, _use_new_zipfile_serialization=zipped)
    assert "pickles more than tensors" in refused(path)
    assert "code from a file" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [["a", "list"], torch.zeros(3), {"step": 3}, {0: torch.zeros(3)}, {"nested": {"a": torch.zeros(3)}}]
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "adapter.bin"
    torch.save(content, path)
    assert "holds no state dict" in refused(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0, 0.001, 0.3, 0.9])
def test_a_damaged_file_is_refused(tmp_path, zipped, kept):
    path = tmp_path / "adapter.bin"
    torch.save({"a": torch.randn(1000), "b": torch.randn(1000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert "is damaged" in refused(path)
    path.write_bytes(bytes(range(1, 256)) * 20)
    assert "is damaged" in refused(path)


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "adapter.bin", tmp_path / "adapter.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a file: give the .safetensors or .bin file"):
            tiny_model().load_reference_adapter(path)
