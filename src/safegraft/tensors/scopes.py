"""Which tensors belong to a scope, by name patterns over all the architectures we know."""

from __future__ import annotations

import re
from typing import Literal, get_args

Scope = Literal["attention", "ffn", "hybrid", "all"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_ATTENTION = re.compile(
    r"(^|\.)(?:self_attn|attention|attn|self_attention|cross_attn)\."
    r"(?:self\.|inner_attention\.)?"
    r"(?:[qkvo]_proj|qkv_proj|out_proj|dense|query|key|value|query_key_value|c_attn|c_proj|Wqkv|wq|wk|wv|wo)\."
    r"(?:weight|bias)$"
)
_FFN = re.compile(r"(^|\.)(?:mlp|feed_forward|ffn|block_sparse_moe|moe|feedforward|shared_mlp)\.")
_NORM = re.compile(r"(?:layer_?norm|norm)\.(?:weight|bias)$", re.IGNORECASE)


def in_scope(name: str, scope: Scope) -> bool:
    """Whether tensor ``name`` belongs to ``scope``: attention = q, k, v and o projections (fused ones too), ffn = the
    whole MLP or expert block, hybrid = both, all = every tensor."""
    if scope == "all":
        return True
    attention = bool(_ATTENTION.search(name))
    ffn = bool(_FFN.search(name)) and not attention and not _NORM.search(name)
    return {"attention": attention, "ffn": ffn, "hybrid": attention or ffn}[scope]
