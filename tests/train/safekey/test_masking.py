"""What query-mask modelling sees, on real architectures."""

from dataclasses import replace

import pytest
import torch

import flash
from safegraft.train.data import IGNORED
from safegraft.train.safekey.batches import NOWHERE, Collator, Traces
from safegraft.train.safekey.losses import LM, DualPathHead, SafeKeyModel, Weights
from safegraft.train.safekey.spans import Spanned

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "mixtral", "gpt_neox"]


def row(size, query, understanding, key, *, seed=0, harmful=True):
    ids = torch.randint(3, 60, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    start = query[1] + 1
    return Spanned(ids, [IGNORED] * start + ids[start:], query, understanding, key, harmful)


ROWS = [row(20, (2, 6), (8, 11), (11, 14)), row(13, (1, 3), (5, 7), (8, 11), seed=1, harmful=False)]


def load(folder, attention):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    return SafeKeyModel(model, DualPathHead(model.config.hidden_size), Weights())


def masked_logits(model, items, packed=False):
    """By row: logits of its kept positions under the masked pass."""
    batch = Collator(0, packed=packed)([Traces(items)[i] for i in range(len(items))])
    with torch.no_grad():
        logits = model._run(batch["masked"])[1]
    sizes = [item.key[1] - (item.query[1] - item.query[0]) for item in items]
    if packed:
        return list(logits[0].split(sizes))
    return [logits[i, :size] for i, size in enumerate(sizes)]


def other_query(item):
    start, end = item.query
    ids = [*item.ids[:start], *((t + 7) % 60 for t in item.ids[start:end]), *item.ids[end:]]
    return replace(item, ids=ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_masked_pass_is_blind_to_the_query_and_sees_all_else(tiny, family, attention):
    model = load(tiny(family), attention)
    found = masked_logits(model, ROWS)
    for ours, theirs in zip(found, masked_logits(model, [other_query(item) for item in ROWS]), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found, masked_logits(model, ROWS, packed=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    template = replace(ROWS[0], ids=[5, 5, *ROWS[0].ids[2:]])
    assert not torch.allclose(masked_logits(model, [template])[0][-1], found[0][-1], atol=1e-4)
    moved = replace(ROWS[0], ids=[*ROWS[0].ids[:9], 4, *ROWS[0].ids[10:]])
    assert not torch.allclose(masked_logits(model, [moved])[0][-1], found[0][-1], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "phi3"])
def test_leaving_the_query_out_is_masking_its_keys_in_every_layer(tiny, family):
    """Against the whole row under a mask [1, 1, n, n] that hides the query's columns, at its usual positions."""
    model = load(tiny(family), "eager")
    for item, ours in zip(ROWS, masked_logits(model, ROWS), strict=True):
        size = item.key[1]
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        seen[:, slice(*item.query)] = False
        seen |= torch.eye(size, dtype=torch.bool)  # a query's own row must see something; nobody sees it
        mask = torch.zeros(1, 1, size, size).masked_fill(~seen, torch.finfo(torch.float32).min)
        with torch.no_grad():
            whole = model.model(input_ids=torch.tensor([item.ids[:size]]), attention_mask=mask, use_cache=False).logits
        kept = [i for i in range(size) if not item.query[0] <= i < item.query[1]]
        torch.testing.assert_close(ours, whole[0, kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_and_packed_batches_and_single_rows_have_the_same_terms(tiny, attention):
    model = load(tiny("llama"), attention)
    items = Traces(ROWS)
    singles = [model(Collator(0)([items[i]]), auxiliary=True) for i in range(2)]
    for collator in (Collator(0), Collator(0, from_first_label=True), Collator(0, packed=True)):
        found = model(collator([items[0], items[1]]), auxiliary=True)
        for name, value in found.items():
            torch.testing.assert_close(value, singles[0][name] + singles[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "phi3"])
def test_flash_attention_has_the_same_terms(tiny, monkeypatch, family):
    """Through transformers' own preparation for its kernels; the kernels stand in, see flash.py. Removed queries leave
    a gap in the position ids, which must not be taken for where a packed row begins."""
    items = Traces(ROWS)
    model = load(tiny(family), "sdpa")
    wanted = [model(Collator(0)([items[i]]), auxiliary=True) for i in range(2)]
    found = load(tiny(family), "sdpa")
    called = flash.switch(found.model, monkeypatch)
    for collator in (Collator(0), Collator(0, from_first_label=True), Collator(0, packed=True, flash=True)):
        singles = [found(collator([items[i]]), auxiliary=True) for i in range(2)]
        both = found(collator([items[0], items[1]]), auxiliary=True)
        for name, value in both.items():
            torch.testing.assert_close(value, wanted[0][name] + wanted[1][name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(singles[0][name], wanted[0][name], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(singles[1][name], wanted[1][name], rtol=1e-4, atol=1e-5)
    assert set(called) == {"plain", "varlen"}


def test_what_a_batch_holds():
    batch = Collator(9, packed=True, flash=True)([Traces(ROWS)[0], Traces(ROWS)[1]])
    assert batch["main"]["cu_seq_lens_q"].tolist() == [0, 20, 33]
    assert batch["masked"]["cu_seq_lens_q"].tolist() == [0, 10, 19]
    assert batch["masked"]["max_length_k"] == 10
    assert batch["masked"]["position_ids"].tolist() == [[0, 1, *range(6, 14), 0, *range(3, 11)]]
    assert "attention_mask" not in batch["masked"]
    padded = Collator(9)([Traces(ROWS)[0], Traces(ROWS)[1]])
    assert padded["masked"]["input_ids"][1].tolist() == [ROWS[1].ids[0], *ROWS[1].ids[3:11], 9]
    assert padded["masked"]["attention_mask"].sum(1).tolist() == [10, 9]
    assert padded["masked_labels"][1].tolist() == [IGNORED] * 6 + ROWS[1].ids[8:11] + [IGNORED]
    assert padded["understanding_rows"][1].tolist() == [NOWHERE] * 5 + [1, 1] + [NOWHERE] * 13
    assert padded["harmful"].tolist() == [1.0, 0.0]


def test_the_heads_train_the_model_unless_detached(tiny):
    batch = Collator(0)([Traces(ROWS)[0], Traces(ROWS)[1]])
    for heads in ("on", "detached"):
        model = load(tiny("llama"), "sdpa")
        model.weights = Weights(heads=heads)
        found = model(batch, auxiliary=True)
        (found["head_u_loss"] + found["head_xu_loss"]).backward()
        moved = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.model.parameters()]
        assert any(moved) is (heads == "on")
        assert all(bool(p.grad.abs().sum() > 0) for p in model.head.parameters())


def test_every_parameter_takes_part_where_no_auxiliary_term_counts(tiny):
    model = load(tiny("llama"), "sdpa")
    model(Collator(0)([Traces(ROWS)[0]]), auxiliary=False)[LM].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(bool((p.grad == 0).all()) for p in model.head.parameters())
