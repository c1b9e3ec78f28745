"""What a run on two ranks saves gives, in one plain process, the logits of the model in training."""

import pytest
import torch

from ldmole_ds.model import LDMoLEModel, ldmole_param_groups
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model


def train_and_save(rank: int, world_size: int, folder: str, stages: list[int]) -> list[torch.Tensor]:
    import deepspeed

    logits = []
    for stage in stages:
        model = tiny_model(tiny_config(lora_dropout=0.1), ep_size=world_size)
        optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=1e-2)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for step in range(3):
            engine.backward(engine(**ragged_batch(rows=3, seed=10 * step + rank)).loss)
            engine.step()
        engine.eval()
        with torch.no_grad():
            logits.append(engine(**ragged_batch(seed=99)).logits.clone())
        model.save_pretrained(f"{folder}/stage{stage}")
    return logits


@pytest.mark.distributed
def test_one_process_gives_the_logits_of_training(tmp_path):
    stages = [2, 3]
    of_ranks = run_distributed(train_and_save, 2, str(tmp_path), stages, deepspeed=True, timeout_s=180)
    start = LDMoLEModel.from_pretrained(tiny_llama(), tmp_path / "stage2")
    assert sum(p.numel() for p in start.input_groups.parameters()) > 0
    for index, stage in enumerate(stages):
        model = LDMoLEModel.from_pretrained(tiny_llama(), tmp_path / f"stage{stage}")
        with torch.no_grad():
            logits = model(**ragged_batch(seed=99)).logits
            bare = tiny_llama()(**ragged_batch(seed=99)).logits
        scale = logits.abs().max()
        assert (logits - bare).abs().max() > 1e-2 * scale, "the adapter must change the logits"
        mask = ragged_batch(seed=99)["attention_mask"].bool()
        for rank_logits in of_ranks:
            assert (logits - rank_logits[index])[mask].abs().max() < 1e-5 * scale
