"""Adapters on two ranks: loaded into another layout, disabled by one rank alone, pushed by rank 0 for all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldmole_ds.config import WEIGHTS_NAME
from ldmole_ds.model import LDMoLEModel
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model


class HubWithoutAccess:
    def __init__(self, token):
        pass

    def create_repo(self, repo_id, **kwargs):
        raise PermissionError("no write access")


class Hub(HubWithoutAccess):
    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, *args, **kwargs):
        return False

    def upload_folder(self, *, folder_path, **kwargs):
        return SimpleNamespace(commit_url=" ".join(sorted(p.name for p in Path(folder_path).iterdir())))


def one_layout(rank: int, folder: str, expert_dispatch: str) -> dict:
    model = LDMoLEModel.from_pretrained(tiny_llama(), folder, ep_size=2, expert_dispatch=expert_dispatch)
    batch = ragged_batch()
    with torch.no_grad():
        result = {"logits": model(**batch).logits, "held": model.input_groups[0].lora_A.shape[1]}
        # Two micro-steps: the gathered weights are kept, and asking whether they still hold is a collective.
        model.train()
        model(**batch, gradient_accumulation_steps=2)
        calls = model.comm_stats.total_calls
        if rank == 0:
            with model.disable_adapter():
                result["disabled"] = model(**batch).logits
                result["generated"] = model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
                result["synced"] = model.needs_all_ranks
        result["calls"] = model.comm_stats.total_calls - calls
        result["again"] = model.eval()(**batch).logits
    return result


def use_adapters(rank: int, world_size: int, folder: str) -> dict:
    import huggingface_hub

    results = {dispatch: one_layout(rank, f"{folder}/adapter", dispatch) for dispatch in ("tokens", "weights")}
    model = LDMoLEModel.from_pretrained(tiny_llama(), f"{folder}/adapter", ep_size=2)
    model.save_pretrained(f"{folder}/again")
    huggingface_hub.HfApi = Hub
    results["pushed"] = model.push_to_hub("user/adapter")
    huggingface_hub.HfApi = HubWithoutAccess
    try:
        model.push_to_hub("user/adapter")
    except OSError as error:
        results["refused"] = str(error)
    return results


@pytest.mark.distributed
def test_two_ranks(tmp_path):
    model = tiny_model(tiny_config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    batch, base = ragged_batch(), tiny_llama().eval()
    mask = batch["attention_mask"].bool()
    expected, bare = model(**batch).logits[mask], base(**batch).logits
    of_ranks = run_distributed(use_adapters, 2, str(tmp_path), timeout_s=150)
    for dispatch in ("tokens", "weights"):
        for results in of_ranks:
            result = results[dispatch]
            assert result["held"] == 4 and result["calls"] == 0
            for name in ("logits", "again"):
                torch.testing.assert_close(result[name][mask], expected, rtol=1e-5, atol=1e-5)
        alone = of_ranks[0][dispatch]
        assert torch.equal(alone["disabled"], bare) and not alone["synced"]
        assert torch.equal(alone["generated"], base.generate(batch["input_ids"], max_new_tokens=3, do_sample=False))
    # Bit for bit: nothing is lost between layouts.
    assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == (tmp_path / "adapter" / WEIGHTS_NAME).read_bytes()
    assert [r["pushed"] for r in of_ranks] == ["README.md adapter_config.json adapter_model.safetensors", None]
    for results in of_ranks:
        assert results["refused"] == "the adapter could not be pushed to user/adapter: no write access"
