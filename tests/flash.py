"""Flash attention's two functions, as its documentation has them, in plain PyTorch: what transformers hands to the
kernels is its own, the kernels themselves (CUDA) are not."""

import torch
from transformers import modeling_flash_attention_utils as theirs


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
           causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
    """q, k, v [tokens, heads, size], the sequences one after another between the bounds of ``cu_seqlens``."""
    assert dropout_p == 0.0
    assert causal
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert int(cu_seqlens_q[-1]) == len(q) == len(k)
    made = torch.empty_like(q)
    for start, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        size, shared = end - start, q.shape[1] // k.shape[1]
        keys, values = (part[start:end].repeat_interleave(shared, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * (softmax_scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        if window_size[0] >= 0:
            seen &= ~torch.ones(size, size, dtype=torch.bool).tril(-window_size[0] - 1)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        made[start:end] = torch.einsum("hqk,khd->qhd", weights, values)
    return made


def plain(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """q, k, v [rows, tokens, heads, size]."""
    rows, size = q.shape[:2]
    ends = torch.arange(0, (rows + 1) * size, size, dtype=torch.int32)
    flat = [part.reshape(-1, *part.shape[2:]) for part in (q, k, v)]
    how = (dropout_p, softmax_scale, causal, window_size, softcap)
    return varlen(*flat, ends, ends, size, size, *how).view(q.shape)


def switch(model, monkeypatch):
    """``model`` computes as under ``attn_implementation="flash_attention_2"``; a list that gets the name of each
    function that is called."""
    process, called = theirs._lazy_define_process_function(varlen), []

    def noted(function):
        return lambda *given, **named: called.append(function.__name__) or function(*given, **named)

    found = ((noted(plain), noted(varlen), None, theirs._pad_input, theirs._unpad_input), (process, None))
    monkeypatch.setattr(theirs, "lazy_import_flash_attention", lambda implementation, *rest: found)
    model.config._attn_implementation_internal = "flash_attention_2"
    return called
