import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from safegraft.errors import ConfigError
from safegraft.train.data import IGNORED
from safegraft.train.safekey.batches import Collator, Traces
from safegraft.train.safekey.losses import HEAD_U, HEAD_XU, LM, QMM, DualPathHead, SafeKeyModel, Weights, pooled
from safegraft.train.safekey.spans import Spanned


class Shares(nn.Module):
    """Hidden state: which share of the tokens so far is 0 and which is 1, padding included."""

    def forward(self, input_ids):
        seen = nn.functional.one_hot(input_ids, 2).double().cumsum(1)
        return (seen / seen.sum(-1, keepdim=True),)


class TwoTokens(nn.Module):
    """A model of two tokens: p(0) : p(1) = 2^(share of 0) : 2^(share of 1)."""

    def __init__(self):
        super().__init__()
        self.base_model = Shares()
        self.config = SimpleNamespace(hidden_size=2, _attn_implementation="eager")

    def forward(self, input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, use_cache=None):
        hidden = self.base_model(input_ids)[0]
        return SimpleNamespace(logits=(math.log(2) * hidden)[:, -logits_to_keep:])


#                 template  query   U    K     answer
ROW = Spanned([0, 1, 1, 0, 1, 0, 1], [IGNORED, IGNORED, IGNORED, 0, 1, 0, 1], (1, 3), (3, 4), (4, 6), True)


def made(item=ROW, **weights):
    model = SafeKeyModel(TwoTokens(), DualPathHead(2), Weights(**weights))
    with torch.no_grad():
        model.head.u.weight.copy_(torch.tensor([[math.log(9), 0.0]]))
        model.head.xu.weight.copy_(torch.tensor([[0.0, 9 / 5 * math.log(2)]]))
        model.head.u.bias.zero_()
        model.head.xu.bias.zero_()
    batch = Collator(0, from_first_label=True)([Traces([item])[0]])
    return {name: float(value.detach()) for name, value in model(batch, auxiliary=True).items()}


LM_BY_HAND = math.log(1 + 2 ** (1 / 3)) + math.log(2) + math.log(1 + 2 ** (1 / 5)) + math.log(2)


def test_the_terms_are_those_worked_out_by_hand():
    """−ln p of a token whose share is d below the other's is ln(1 + 2^d).

    All tokens: shares of 1 − shares of 0 before the four that are learnt are 1/3 (0 comes), 0, 1/5 (0 comes), 0.
    Without the query K is seen after 0 0, and after 0 0 1. U's state is (1/2, 1/2), which the head over U turns into
    ln 3; the states of query and U have the mean (4/9, 5/9), which the other turns into ln 2.
    """
    found = made()
    assert found[LM] == pytest.approx(LM_BY_HAND)
    assert found[QMM] == pytest.approx(math.log(3) + math.log(1 + 2 ** (-1 / 3)))
    assert found[HEAD_U] == pytest.approx(math.log(4 / 3))
    assert found[HEAD_XU] == pytest.approx(math.log(3 / 2))


def test_benign_rows_and_the_unmasked_term():
    benign = Spanned(ROW.ids, ROW.labels, ROW.query, ROW.understanding, ROW.key, False)
    found = made(benign, query="seen")
    assert found[LM] == pytest.approx(LM_BY_HAND)
    assert found[QMM] == pytest.approx(math.log(2) + math.log(1 + 2 ** (1 / 5)))
    assert found[HEAD_U] == pytest.approx(math.log(4))
    assert found[HEAD_XU] == pytest.approx(math.log(3))


def test_the_weights_are_the_papers_and_each_ablation_drops_its_own():
    assert Weights().of(auxiliary=True) == {LM: 1.0, QMM: 0.2, HEAD_U: 0.1, HEAD_XU: 0.1}
    assert Weights(theta=0.75).of(auxiliary=True) == pytest.approx({LM: 1.0, QMM: 0.2, HEAD_U: 0.15, HEAD_XU: 0.05})
    assert Weights().of(auxiliary=False) == {LM: 1.0}
    assert set(made(heads="off")) == {LM, QMM}
    assert set(made(query="off")) == {LM, HEAD_U, HEAD_XU}
    whole = made()
    for changes in ({"heads": "off"}, {"query": "off"}, {"query": "seen"}, {"heads": "detached"}):
        own = {QMM} if "query" in changes else set()
        found = made(**changes)
        assert {n: v for n, v in found.items() if n not in own} == {n: whole[n] for n in found if n not in own}


def test_pooling_is_a_mean_over_each_rows_own_tokens():
    states = torch.tensor([[1.0, 2.0], [3.0, 6.0], [10.0, 10.0], [5.0, 5.0]])
    found = pooled(states, torch.tensor([1, 1, -1, 0]), 2)
    assert found.tolist() == [[5.0, 5.0], [2.0, 4.0]]


def test_a_model_without_positions_is_refused():
    class Alibi(TwoTokens):
        def forward(self, input_ids, attention_mask=None):
            raise AssertionError

    with pytest.raises(ConfigError, match="takes no position_ids"):
        SafeKeyModel(Alibi(), DualPathHead(2), Weights())
