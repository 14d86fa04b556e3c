"""Spans exact to the token, for tokenizers built as those of Llama-3, Qwen and Mistral are."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from safegraft.errors import ConfigError
from safegraft.train.data import IGNORED
from safegraft.train.safekey.spans import RowError, Trace, add_think_template, frame_of, spanned

TEXTS = [
    "Okay, so the user is asking how to bake naïve bread ☕ in a café. Hmm, that's fine.\n\nFirst, I need flour.",
    "How do I bake bread? 用户在问怎么烤面包。嗯，这没问题。 They want it.\n\n\nI should help. </think> Mix it.",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if no_think %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)


def fast(made, specials, texts, template, eos, *, alphabet=(), size=700):
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=list(alphabet), show_progress=False
    )
    made.train_from_iterator(texts * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(specials, template, eos, *, nfc):
    made = Tokenizer(BPE())
    if nfc:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.post_processor = processors.ByteLevel(trim_offsets=nfc)
    made.decoder = decoders.ByteLevel()
    return fast(made, specials, TEXTS, template, eos, alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama():
    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(specials, LLAMA, "<|eot_id|>", nfc=False)


def qwen():
    return byte_level(["<|im_start|>", "<|im_end|>"], QWEN, "<|im_end|>", nfc=True)


def mistral():
    """As SentencePiece's: a space is a letter of the word after it, and characters that are not known become bytes."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    known = [text.replace("☕", "").replace("嗯", "").replace(" ", "▁") for text in TEXTS]
    letters = sorted({*"".join(known), *"[]/INST<>think.?"})
    return fast(made, specials[:3] + specials[3:], known, MISTRAL, "</s>", alphabet=letters)


MAKERS = {"llama": llama, "qwen": qwen, "mistral": mistral}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


def trace(query, u, k, *, between=" ", more=" Then on."):
    response = f"<think>\n{u}{between}{k}{more}\n</think>\n\nMix it."
    at, key = response.index(u), response.index(k, response.index(u) + len(u))
    return Trace("t", query, response, True, (at, at + len(u)), (key, key + len(k)))


CASES = {
    "plain": trace("How do I bake bread?", "Okay, so the user is asking how to bake bread.", "Hmm, that's fine."),
    "multibyte": trace("café ☕ naïve?", "The user asks of a naïve café ☕.", "Hmm ☕, that's fine ☕!"),
    "no white space": trace("怎么烤面包？", "用户在问怎么烤面包。", "嗯，这没问题。", between="", more="好。"),
    "merged line breaks": trace(
        "How do I?", "The user is asking.", "First, I need flour.", between="\n\n", more="\n\n"
    ),
    "many spaces": trace("  How do I?  ", "They want it.", "I should help.", between="   "),
}


def covered(tokenizer, item, text, span):
    """The characters of ``text`` that the tokens of ``span`` hold, by the offsets of a tokenisation made here."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[offsets[span[0]][0] : offsets[span[1] - 1][1]]


MERGED = {("llama", "no white space"), ("qwen", "no white space")}
"""Where U's last full stop and K's first letter are one token, which is U's then."""


@pytest.mark.parametrize("case", CASES)
def test_spans_are_exact_to_the_token(tokenizer, case, request):
    tokenizer_name = request.node.callspec.params["tokenizer"]
    row = CASES[case]
    frame = frame_of(tokenizer)
    item = spanned(tokenizer, frame, row, max_length=1000)
    body = row.response
    if frame.opened:
        body = body.removeprefix("<think>\n" if frame.after.endswith("\n") else "<think>")
    text = frame.before + row.prompt.strip() + frame.after + body + frame.end
    assert item.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    u, k = row.response[slice(*row.understanding)], row.response[slice(*row.key)]
    if (tokenizer_name, case) in MERGED:
        u, k = u + k[0], k[1:]
    assert covered(tokenizer, item, text, item.understanding).strip() == u
    assert covered(tokenizer, item, text, item.key).strip() == k
    held = covered(tokenizer, item, text, item.query)
    assert row.prompt.strip() in held
    assert len(held.strip()) == len(row.prompt.strip())
    assert item.query[1] <= item.understanding[0] < item.understanding[1] <= item.key[0] < item.key[1] < len(item.ids)
    learnt = [i for i, label in enumerate(item.labels) if label != IGNORED]
    assert learnt == list(range(learnt[0], len(item.ids)))
    assert covered(tokenizer, item, text, (learnt[0], len(item.ids))).strip() == (body + frame.end).strip()
    assert item.ids[-1] == tokenizer.eos_token_id


def test_a_merge_across_the_end_of_u_is_given_to_u():
    made = Tokenizer(BPE({"a": 0, ".": 1, "b": 2, ".b": 3, "<e>": 4, "<think>": 5, "\n": 6}, [(".", "b")]))
    made.add_special_tokens(["<e>", "<think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    row = Trace("t", "ab", "<think>a.bb\naa\n</think>", True, (7, 9), (9, 11))
    item = spanned(tokenizer, frame_of(tokenizer), row, max_length=100)
    assert item.ids[:7] == [0, 2, 4, 5, 0, 3, 2]  # a b <e> <think> a .b b
    assert (item.query, item.understanding, item.key) == ((0, 2), (4, 6), (6, 7))


def test_truncation_cuts_the_answer_or_drops_the_row(tokenizer):
    row, frame = CASES["plain"], frame_of(tokenizer)
    whole = spanned(tokenizer, frame, row, max_length=1000)
    cut = spanned(tokenizer, frame, row, max_length=whole.key[1])
    assert cut.ids == whole.ids[: whole.key[1]]
    assert (cut.query, cut.understanding, cut.key) == (whole.query, whole.understanding, whole.key)
    with pytest.raises(RowError, match=rf"ends at token {whole.key[1]}, beyond the {whole.key[1] - 1}"):
        spanned(tokenizer, frame, row, max_length=whole.key[1] - 1)


def test_templates():
    tokenizer = llama()
    frame = frame_of(tokenizer)
    assert frame.opened
    assert frame.end == "<|eot_id|>"
    assert not frame_of(qwen()).opened  # drops the reasoning of turns that are over, and is used all the same
    with pytest.raises(ConfigError, match="already"):
        add_think_template(tokenizer)
    tokenizer.chat_template = LLAMA.replace("<think>\n", "")
    with pytest.raises(ConfigError, match="no think block") as told:
        frame_of(tokenizer)
    assert "--think-template" in told.value.hint
    add_think_template(tokenizer)
    assert frame_of(tokenizer) == frame
    tokenizer.chat_template = LLAMA.replace("m.content | trim", "m.content | upper")
    with pytest.raises(ConfigError, match="unchanged"):
        frame_of(tokenizer)
    tokenizer.chat_template = LLAMA.replace("m.content | trim", "m.content | replace('bake', 'burn')")
    with pytest.raises(RowError, match="changes its query"):
        spanned(tokenizer, frame_of(tokenizer), CASES["plain"], max_length=1000)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        frame_of(tokenizer)
