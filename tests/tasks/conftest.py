"""Tokenizers of three families, trained in memory on a few lines."""

import string

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Topics: bank, travel, home\n\nMessage: pay a bill\nTopic: bank",
    "Topics: bank, travel, home\n\nMessage: book a flight\nTopic: travel",
    "Topics: bank, travel, home\n\nMessage: light the lamp\nTopic: home",
    "What?\nA. one\nB. two\nAnswer: A\nAnswer: B",
] * 4


def _byte_level():
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=["<eos>"]))
    return tokenizer


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    """As GPT-2 and SmolLM2: byte-level, no special tokens around a text, no padding token."""
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level(), bos_token="<eos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def eos_tokenizer():
    """Byte-level with the same token before and after every text, as BOS and as EOS."""
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.token_to_id("<eos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def llama_tokenizer():
    """As Llama 2: spaces become U+2581, one more goes before every text, and BOS before that."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    special = ["<unk>", "<s>", "</s>"]
    # Without a pre-tokenizer a merge could span words; cutting at each space keeps the trainer from it.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    # Every letter of an option is known, whether the lines above have it or not.
    letters = list(string.ascii_uppercase)
    tokenizer.train_from_iterator(TEXT, BpeTrainer(vocab_size=180, initial_alphabet=letters, special_tokens=special))
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
