import pytest
import torch

import chat_models
from safegraft.errors import ConfigError
from safegraft.train.data import IGNORED, Conversations, PadRight, Pair, encode


@pytest.fixture(scope="module")
def tokenizer():
    return chat_models.tokenizer()


def labelled(encoded):
    return [i for i, label in enumerate(encoded.labels) if label != IGNORED]


@pytest.mark.parametrize("answer", ["Bread.", "naïve – café ☕", "two\nlines", " leading space", "42"])
def test_labels_are_the_answer_and_its_end_token(tokenizer, answer):
    made = encode(tokenizer, "How do I bake bread?", answer)
    where = labelled(made)
    assert where == list(range(where[0], len(made.ids)))
    assert [made.labels[i] for i in where] == [made.ids[i] for i in where]
    assert tokenizer.decode([made.ids[i] for i in where]) == answer + "<|im_end|>"


def test_the_prompt_is_tokenised_as_generation_will_see_it(tokenizer):
    made = encode(tokenizer, "How do I bake bread?", "Mix flour.")
    turns = [{"role": "user", "content": "How do I bake bread?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert made.ids[: len(prompt)] == prompt
    assert labelled(made)[0] == len(prompt)


def test_an_end_token_within_the_answer_ends_it(tokenizer):
    made = encode(tokenizer, "Hi", "one<|im_end|>two")
    assert tokenizer.decode([made.ids[i] for i in labelled(made)]) == "one<|im_end|>"


def test_long_conversations_are_cut_and_empty_ones_refused(tokenizer):
    whole = encode(tokenizer, "Hi", "one two three")
    cut = encode(tokenizer, "Hi", "one two three", max_length=len(whole.ids) - 2)
    assert cut.ids == whole.ids[:-2]
    with pytest.raises(ConfigError, match="nothing of the answer"):
        encode(tokenizer, "Hi", "one", max_length=3)


def test_templates_that_cannot_be_used_are_named(tokenizer):
    bare = chat_models.tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode(bare, "Hi", "there")
    bare.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="differently once there is an answer"):
        encode(bare, "Hi", "there")


def test_padding_is_masked_though_the_pad_token_is_the_end_token(tokenizer):
    rows = Conversations(tokenizer, [Pair("Hi", "one"), Pair("How do I bake bread?", "Mix flour, water and salt.")])
    batch = PadRight(tokenizer.pad_token_id)([rows[0], rows[1]])
    short = len(rows[0]["input_ids"])
    assert batch["attention_mask"][0].tolist() == [1] * short + [0] * (len(rows[1]["input_ids"]) - short)
    assert batch["input_ids"][0, short:].eq(tokenizer.pad_token_id).all()
    assert batch["labels"][0, short:].eq(IGNORED).all()
    assert batch["labels"][0, short - 1] == tokenizer.eos_token_id
    assert rows.tokens == batch["attention_mask"].sum()


def test_leaving_out_the_prompts_logits_changes_no_loss(tokenizer, tmp_path):
    model, _ = chat_models.load(chat_models.build(tmp_path / "m"))
    rows = Conversations(tokenizer, [Pair("Hi", "one"), Pair("How do I bake bread?", "Mix flour.")])
    whole = model(**PadRight(2)([rows[0], rows[1]]))
    short = model(**PadRight(2, from_first_label=True)([rows[0], rows[1]]))
    assert short.logits.shape[1] < whole.logits.shape[1]
    torch.testing.assert_close(short.loss, whole.loss)
