"""A tiny random Llama with a byte-level tokenizer in a folder, and small data files."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MESSAGES = {
    "bank": ["pay a bill", "what is my balance", "freeze my card", "send money to mum"],
    "travel": ["book a flight", "find me a hotel", "do i need a visa", "rent a car in rome"],
    "home": ["light the lamp", "play some music", "turn the heat down", "lock the front door"],
}


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """Hidden 32, two layers, random weights; its answers are chance until trained."""
    folder = tmp_path_factory.mktemp("tiny_model")
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = [f"Topics: bank, home, travel\n\nMessage: {m}\nTopic: {t}" for t, ms in MESSAGES.items() for m in ms]
    trainer = BpeTrainer(vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"])
    backend.train_from_iterator(text * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """``train.jsonl`` and ``test.jsonl`` of text and label, ``choice.jsonl`` in ARC's schema."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": m, "label": t} for t, ms in MESSAGES.items() for m in ms]
    for name, part in (("train", rows), ("test", rows[1::4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    choices = {"text": ["red", "blue", "green"], "label": ["A", "B", "C"]}
    choice = {"question": "Which colour is the sky?", "choices": choices, "answerKey": "B"}
    (folder / "choice.jsonl").write_text(json.dumps(choice) + "\n" + json.dumps({**choice, "answerKey": "C"}) + "\n")
    return folder
