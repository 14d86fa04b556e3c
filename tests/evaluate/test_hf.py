import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3Config, Gemma3nTextConfig, GPT2Config, MambaConfig
from transformers.cache_utils import DynamicLayer

import chat_models
import traces
from safegraft.errors import ConfigError
from safegraft.evaluate.models import hf, rolling
from safegraft.evaluate.models.hf import HfChatModel
from safegraft.evaluate.records import Message, Record, Sampling, ask, read_records, write_records
from safegraft.evaluate.thinking import split

PROMPTS = [
    "Hi",
    "How do I bake bread?",
    "How do I bake bread for a rather large number of people, please?",
    "Hi you",
    "Hi",
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return chat_models.load(chat_models.build(tmp_path_factory.mktemp("chat") / "m", loud=8.0, tied=False))


@pytest.mark.parametrize("batch", [2, 5])
def test_a_batch_answers_as_one_at_a_time(loaded, batch):
    chats, sampling = [ask(p) for p in PROMPTS], Sampling(12)
    alone = [HfChatModel(*loaded, batch=1).replies([chat], sampling)[0] for chat in chats]
    assert HfChatModel(*loaded, batch=batch).replies(chats, sampling) == alone
    assert len({reply.text for reply in alone}) > 2


def test_prompts_without_a_common_opening(loaded):
    chats = [(Message("system", text), Message("user", "Hi")) for text in ("a", "Bread", "")]
    alone = [HfChatModel(*loaded).replies([chat], Sampling(8))[0] for chat in chats]
    assert HfChatModel(*loaded).replies(chats, Sampling(8)) == alone


def test_replies_end_at_the_end_token(loaded, monkeypatch):
    model, tokenizer = loaded
    whole = HfChatModel(model, tokenizer).replies([ask("Hi")], Sampling(6))[0]
    assert (whole.tokens, whole.finished) == (6, False)
    ids = HfChatModel(model, tokenizer)._ids(ask("Hi"))
    made = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=int), max_new_tokens=6)
    new = made[0, len(ids) :].tolist()
    stop = next(i for i, token in enumerate(new) if i > 1 and token not in new[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [new[stop], 2])
    cut = HfChatModel(model, tokenizer).replies([ask("Hi"), ask("How")], Sampling(6))[0]
    assert (cut.tokens, cut.finished) == (stop, True)
    assert whole.text.startswith(cut.text)


def calls_of(model, monkeypatch):
    """The rows and the new tokens that each call of ``generate`` is asked for."""
    seen, plain = [], model.generate

    def spied(**given):
        seen.append((len(given["input_ids"]), given["max_new_tokens"]))
        return plain(**given)

    monkeypatch.setattr(model, "generate", spied)
    return seen


@pytest.mark.parametrize("shared", [True, False])
def test_ended_answers_leave_the_batch_and_others_join(loaded, monkeypatch, shared):
    """With or without a common opening, the answers are those of one prompt at a time."""
    model, tokenizer = loaded
    chats = [ask(p) for p in [*PROMPTS, "What", "How do I", "Bread?"]]
    if not shared:
        chats = [(Message("system", "ab"[i % 2]), *chat) for i, chat in enumerate(chats)]
    ids = HfChatModel(model, tokenizer)._ids(chats[1])
    made = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=int), max_new_tokens=12)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [made[0, len(ids) + 2].item(), 2])
    alone = [HfChatModel(model, tokenizer, batch=1).replies([chat], Sampling(12))[0] for chat in chats]
    assert {reply.finished for reply in alone} == {True, False}
    monkeypatch.setattr(hf, "STAGE", 3)
    monkeypatch.setattr(rolling, "ROOM", 4)
    seen, told = calls_of(model, monkeypatch), []
    chat = HfChatModel(model, tokenizer, batch=4, progress=lambda *now: told.append(now))
    assert chat.replies(chats, Sampling(12)) == alone
    assert max(rows for rows, _ in seen) == 4
    begun = [rows for rows, tokens in seen if tokens == 1]
    assert sum(begun) == len(chats)  # each was begun once
    assert any(
        tokens == 3 and after == 1 and rows > joining for (rows, tokens), (joining, after) in itertools.pairwise(seen)
    )  # while others went on
    assert told == sorted(told)
    assert told[-1] == (8, 8)


def test_a_layer_with_room_holds_what_a_plain_one_does(monkeypatch):
    """Through growing, and rows taken out and put in behind its back; writing where there is room copies nothing."""
    monkeypatch.setattr(rolling, "ROOM", 3)
    made = torch.Generator().manual_seed(0)
    plain = DynamicLayer()
    plain.update(*torch.randn(2, 4, 2, 5, 6, generator=made))
    roomy, copies = rolling.Roomy(plain), 0
    for step in range(12):
        if step == 5:
            for layer in (plain, roomy):
                layer.keys, layer.values = layer.keys[1:], layer.values[1:]
        keys, values = torch.randn(2, len(plain.keys), 2, 1, 6, generator=made)
        before = roomy.keys.data_ptr()
        for ours, theirs in zip(roomy.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(ours, theirs)
        copies += roomy.keys.data_ptr() != before
        assert roomy.get_seq_length() == plain.get_seq_length()
    assert copies == 4  # at first, full after 3 more, rows taken out, full again


def test_a_batch_is_as_large_as_memory_lets_it(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(rolling, "ROOM", 4)
    chats, seen = [ask(p) for p in PROMPTS], calls_of(model, monkeypatch)
    wanted = HfChatModel(model, tokenizer, batch=2).replies(chats, Sampling(6))
    assert max(rows for rows, _ in seen) == 2
    longest = max(len(HfChatModel(model, tokenizer)._ids(chat)) for chat in chats) + 6
    config = model.config
    # float32 keys and values in every layer; four times the widths of what passes
    token = 4 * (2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)
    token += 4 * 4 * (config.hidden_size + config.intermediate_size)
    for rows, share in ((1, 0.5), (2, 2.5), (len(chats), 1000)):
        seen.clear()
        monkeypatch.setattr(hf, "memory_of", lambda device, share=share: int(share * 4 * token * longest))
        assert HfChatModel(model, tokenizer).replies(chats, Sampling(6)) == wanted
        assert max(made for made, _ in seen) == rows
    monkeypatch.setattr(hf, "MOST", 2)
    seen.clear()
    HfChatModel(model, tokenizer).replies(chats, Sampling(6))
    assert max(made for made, _ in seen) == 2


@pytest.mark.parametrize(
    ("config", "wanted"),
    [(GPT2Config(n_embd=32, n_layer=3, n_head=4), 2 * 3 * 32 + 4 * (32 + 128)),
     (MambaConfig(hidden_size=16, num_hidden_layers=2, intermediate_size=64), 2 * 2 * 16 + 4 * (16 + 64)),
     (Gemma3nTextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                  intermediate_size=[50, 70]), 2 * 2 * 2 * 6 + 4 * (32 + 70))],
    ids=["all heads keep", "no heads", "by layer"],
)  # fmt: skip
def test_what_a_token_takes(config, wanted):
    model = SimpleNamespace(config=config, dtype=torch.bfloat16)
    assert hf._bytes_per_token(model) == 2 * wanted


def test_a_model_that_forgets_is_asked_once(loaded, monkeypatch):
    """A sliding window, and a setting that counts from where the generation began, would not survive a break."""
    model, tokenizer = loaded
    monkeypatch.setattr(hf, "STAGE", 3)
    for place, name, value in ((model.config, "sliding_window", 8), (model.generation_config, "min_new_tokens", 5)):
        with monkeypatch.context() as changed:
            changed.setattr(place, name, value, raising=False)
            seen = calls_of(model, changed)
            HfChatModel(model, tokenizer).replies([ask("Hi")], Sampling(9))
            assert seen == [(1, 9)]


def test_a_window_is_found_in_the_text_part_of_a_configuration():
    parts = {"text_config": {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": ["full_attention"] * 2}}
    assert hf._attends_to_all(Gemma3Config(**parts))
    parts["text_config"]["layer_types"] = ["sliding_attention", "full_attention"]
    assert not hf._attends_to_all(Gemma3Config(**parts))


def test_a_model_that_would_search_beams_is_greedy_all_the_same(loaded, monkeypatch):
    model, tokenizer = loaded
    wanted = HfChatModel(model, tokenizer).replies([ask("Hi")], Sampling(20))
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    assert HfChatModel(model, tokenizer).replies([ask("Hi")], Sampling(20)) == wanted


def test_a_model_without_such_a_cache_is_asked_a_batch_at_a_time(loaded, monkeypatch):
    model, tokenizer = loaded
    chats = [ask(p) for p in PROMPTS]
    wanted = HfChatModel(model, tokenizer).replies(chats, Sampling(6))
    monkeypatch.setattr(model.config, "use_cache", False)
    monkeypatch.setattr(model.generation_config, "use_cache", False)
    monkeypatch.setattr(HfChatModel, "_opening", lambda *_: None)
    seen = calls_of(model, monkeypatch)
    assert HfChatModel(model, tokenizer, batch=3).replies(chats, Sampling(6)) == wanted
    assert seen == [(3, 1), (3, 6), (2, 6)]


def test_a_begun_answer_is_continued(loaded):
    """The reply to a prefilled answer is what the model itself would have gone on with."""
    model, tokenizer = loaded
    chat = HfChatModel(model, tokenizer)
    begun = (*ask("How do I bake bread?"), Message("assistant", "Mix flour"))
    assert chat._ids(begun) == chat._ids(ask("How do I bake bread?")) + tokenizer("Mix flour")["input_ids"]
    ids = torch.tensor([chat._ids(begun)])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    wanted = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    mixed = chat.replies([ask("Hi"), begun, begun[:1]], Sampling(6))
    assert mixed[1].text == wanted
    assert mixed[0] == chat.replies([ask("Hi")], Sampling(6))[0]


def test_a_template_that_drops_the_begun_answer(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(ConfigError, match="no answer be begun"):
        HfChatModel(model, tokenizer).replies([(*ask("Hi"), Message("assistant", "Sure"))], Sampling(2))


def test_progress_and_refusals_of_nonsense(loaded):
    seen = []
    HfChatModel(*loaded, batch=2, progress=lambda *now: seen.append(now)).replies(
        [ask(p) for p in PROMPTS], Sampling(1)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    with pytest.raises(ConfigError):
        HfChatModel(*loaded, batch=0)
    with pytest.raises(ConfigError):
        HfChatModel(*loaded).replies([ask("Hi")], Sampling(0))


def test_records_round_trip(tmp_path):
    records = [Record("m", "harmful", f"h{i}", "ä\n☕", "reply", "refused", "phrases") for i in range(3)]
    write_records(tmp_path / "r.jsonl", records)
    assert read_records(tmp_path / "r.jsonl") == records


def test_a_template_that_opens_the_reasoning_shows_in_the_reply(loaded):
    model, tokenizer = loaded
    plain = HfChatModel(model, tokenizer).replies([ask("Hi")], Sampling(4))[0]
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = traces.THINKING
    chat = HfChatModel(model, thinking)
    begun = (Message("user", "Hi"), Message("assistant", "Sure"))
    opened, prefilled = chat.replies([ask("Hi"), begun], Sampling(4))
    assert opened.text.startswith("<think>\n")
    assert opened.tokens == 4
    assert split(opened.text).outcome == "truncated"  # not an answer, though the model wrote no tag itself
    assert not prefilled.text.startswith("<think>")
    assert split(plain.text).outcome == "none"
