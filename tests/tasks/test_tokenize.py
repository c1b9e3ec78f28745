"""Tokens of prompts and answers, in three families of tokenizers, and what is cut when there is too much of them."""

from dataclasses import replace

import pytest

from ldmole_ds.tasks import ChoiceDataset, DataError, EncodedQuestion, Question, encode_question

QUESTION = Question("Topics: bank, travel\n\nMessage: pay a bill\nTopic:", (" bank", " travel"), 1)


def test_byte_level_tokens_are_those_of_the_text(gpt2_tokenizer):
    encoded = encode_question(gpt2_tokenizer, QUESTION, 100)
    assert gpt2_tokenizer.decode(encoded.prompt_ids) == QUESTION.prompt
    assert [gpt2_tokenizer.decode(ids) for ids in encoded.candidate_ids] == [" bank", " travel"]
    assert encoded.candidate_ids == tuple(tuple(gpt2_tokenizer(text)["input_ids"]) for text in QUESTION.candidates)
    assert (encoded.gold, encoded.num_cut_tokens) == (1, 0)


def test_prompt_and_answer_read_as_one_text(llama_tokenizer):
    encoded = encode_question(llama_tokenizer, QUESTION, 100)
    for text, ids in zip(QUESTION.candidates, encoded.candidate_ids, strict=True):
        whole = llama_tokenizer(QUESTION.prompt + text)["input_ids"]
        assert [*encoded.prompt_ids, *ids] == whole
        assert llama_tokenizer.bos_token_id not in ids
    # By itself the answer would have got a second space.
    alone = llama_tokenizer(" bank", add_special_tokens=False)["input_ids"]
    assert llama_tokenizer.convert_ids_to_tokens(alone)[0] == "\u2581"
    assert llama_tokenizer.convert_ids_to_tokens(encoded.candidate_ids[0]) == ["\u2581bank"]


def test_prompt_keeps_bos_and_drops_eos(eos_tokenizer, llama_tokenizer):
    plain = eos_tokenizer(QUESTION.prompt, add_special_tokens=False)["input_ids"]
    assert list(encode_question(eos_tokenizer, QUESTION, 100).prompt_ids) == [eos_tokenizer.bos_token_id, *plain]
    assert encode_question(llama_tokenizer, QUESTION, 100).prompt_ids[0] == llama_tokenizer.bos_token_id


def test_truncation_cuts_the_left_of_the_prompt_and_keeps_bos(eos_tokenizer):
    whole = encode_question(eos_tokenizer, QUESTION, 100)
    longest = max(len(ids) for ids in whole.candidate_ids)
    length = len(whole.prompt_ids) + longest
    assert encode_question(eos_tokenizer, QUESTION, length) == whole
    cut = encode_question(eos_tokenizer, QUESTION, length - 3)
    assert cut.prompt_ids == (whole.prompt_ids[0], *whole.prompt_ids[4:])
    assert cut.candidate_ids == whole.candidate_ids
    assert cut.num_cut_tokens == 3


def test_max_length_must_hold_an_answer_and_some_prompt(eos_tokenizer):
    longest = max(len(ids) for ids in encode_question(eos_tokenizer, QUESTION, 100).candidate_ids)
    # BOS, one token of the prompt, the answer.
    shortest = encode_question(eos_tokenizer, QUESTION, longest + 2)
    assert len(shortest.prompt_ids) == 2
    with pytest.raises(
        ValueError, match=rf"max_length {longest + 1} cannot hold .*--max_length to at least {longest + 2}"
    ):
        encode_question(eos_tokenizer, QUESTION, longest + 1)


def test_a_candidate_that_begins_another_ends_with_a_line_break(gpt2_tokenizer):
    question = Question("Topic:", (" travel", " travel alert", " bank"), 0)
    encoded = encode_question(gpt2_tokenizer, question, 100)
    assert [gpt2_tokenizer.decode(ids) for ids in encoded.candidate_ids] == [" travel\n", " travel alert\n", " bank\n"]


def test_candidates_with_equal_tokens(gpt2_tokenizer, llama_tokenizer):
    with pytest.raises(
        DataError, match=r"candidates ' bank' and ' bank' are the same .* other words with --label_words"
    ):
        encode_question(gpt2_tokenizer, Question("Topic:", (" home", " bank", " bank"), 0), 100)
    # Neither sign is in the vocabulary: both are a space and <unk>.
    with pytest.raises(DataError, match="' #' and ' %' are the same to the tokenizer"):
        encode_question(llama_tokenizer, Question("Topic:", (" #", " %"), 0), 100)


def test_candidate_without_tokens(gpt2_tokenizer):
    with pytest.raises(DataError, match="candidate '' has no tokens in this tokenizer; .*--label_words"):
        encode_question(gpt2_tokenizer, Question("Topic:", (" a", ""), 0), 100)


def test_an_answer_that_merges_with_the_prompt_is_encoded_by_itself(gpt2_tokenizer):
    # "Topic" is one token, so nothing is left of the anchor "Top" once "ic" follows it.
    encoded = encode_question(gpt2_tokenizer, Question("Top", ("ic", " bank"), 0), 100)
    assert [gpt2_tokenizer.decode(ids) for ids in encoded.candidate_ids] == ["ic", " bank"]


def test_dataset(gpt2_tokenizer):
    one = EncodedQuestion((5, 6), ((1,), (2,)), 0)
    two = EncodedQuestion((5,), ((1,), (2,), (3,)), 2, num_cut_tokens=4)
    long = EncodedQuestion((5,), ((1, 4), (2,)), 0)
    dataset = ChoiceDataset([one, two])
    assert (len(dataset), dataset[1]) == (2, two)
    assert (dataset.max_candidates, dataset.max_candidate_length, dataset.single_token) == (3, 1, True)
    assert dataset.num_truncated == 1
    assert (ChoiceDataset([one, long]).max_candidate_length, ChoiceDataset([one, long]).single_token) == (2, False)
    encoded = ChoiceDataset.from_questions([QUESTION], gpt2_tokenizer, 100)
    assert encoded[0] == encode_question(gpt2_tokenizer, QUESTION, 100)
    with pytest.raises(DataError, match="no questions .* expected at least one"):
        ChoiceDataset([])


def test_many_questions_are_encoded_as_each_is(gpt2_tokenizer, llama_tokenizer, eos_tokenizer, monkeypatch):
    monkeypatch.setattr("ldmole_ds.tasks.tokenize._TOGETHER", 3)
    shared, own = (" home", " travel", " travel alert"), (" bank", " home")
    questions = [Question(f"Query: {'book ' * n}a room\nTopic:", shared if n % 2 else own, n % 2) for n in range(7)]
    questions += [replace(questions[1], prompt="Topic"), replace(questions[1], lengths=(4, 6, 12)), questions[1]]
    for tokenizer in (gpt2_tokenizer, llama_tokenizer, eos_tokenizer):
        together = ChoiceDataset.from_questions(questions, tokenizer, 24).questions
        assert together == [encode_question(tokenizer, question, 24) for question in questions]
        assert any(q.num_cut_tokens for q in together)
