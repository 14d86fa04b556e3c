"""Checkpoints of SmolLM2-135M's shapes (or more layers of them) with random float32 weights.

python benchmarks/synthetic.py FOLDER LAYERS
"""

import json
import os
import sys
import zlib
from pathlib import Path

import torch

from safegraft.tensors.files import build_layout
from safegraft.tensors.source import TensorSpec, as_bytes

HIDDEN, INNER, KV, VOCABULARY = 576, 1536, 192, 49152
LAYER = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.k_proj.weight": (KV, HIDDEN),
    "self_attn.v_proj.weight": (KV, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.gate_proj.weight": (INNER, HIDDEN),
    "mlp.up_proj.weight": (INNER, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INNER),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
}  # fmt: skip


def write(folder: Path, layers: int, parts: list[tuple[int, float, str]]) -> None:
    """A checkpoint that is the sum of random parts ``(seed, scale, only tensors whose name contains this)``.

    The parts' singular values fall like 1/√i, as trained deltas' do more or less; part 0 is white.
    """
    specs = [TensorSpec("model.embed_tokens.weight", torch.float32, (VOCABULARY, HIDDEN))]
    for layer in range(layers):
        specs += [TensorSpec(f"model.layers.{layer}.{n}", torch.float32, shape) for n, shape in LAYER.items()]
    specs.append(TensorSpec("model.norm.weight", torch.float32, (HIDDEN,)))
    layout = build_layout("model.safetensors", specs, {"format": "pt"})
    folder.mkdir(parents=True)
    made: dict[tuple[object, ...], torch.Tensor] = {}
    with (folder / layout.filename).open("wb") as file:
        os.ftruncate(file.fileno(), layout.nbytes)
        os.pwrite(file.fileno(), layout.header, 0)
        for spec in specs:
            # Twelve different layers are enough; the thirteenth repeats the first.
            number = int(spec.name.split(".")[2]) % 12 if ".layers." in spec.name else -1
            total = torch.zeros(spec.shape)
            for i, (seed, scale, only) in enumerate(parts):
                if only not in spec.name:
                    continue
                key = (spec.name.split(".", 3)[-1], spec.shape, number, seed)
                if key not in made:
                    made[key] = _random(spec.shape, hash_of(key), white=i == 0)
                total += scale * made[key]
            os.pwrite(file.fileno(), as_bytes(total), layout.entries[spec.name].offset)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def hash_of(key: tuple[object, ...]) -> int:
    return zlib.crc32(repr(key).encode())


def _random(shape: tuple[int, ...], seed: int, *, white: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if white or len(shape) < 2 or shape[0] > 10_000:
        return torch.randn(shape, generator=g)
    left, right = (torch.randn(n, min(shape), generator=g) for n in shape)
    values = torch.arange(1, min(shape) + 1) ** -0.5
    product = (left * values) @ right.T
    return product / product.std()


def four(folder: Path, layers: int) -> None:
    """``base`` (also the aligned model), ``finetuned``, ``surrogate`` (attention changed), below ``folder``."""
    base = (0, 0.05, "")
    write(folder / "base", layers, [base])
    write(folder / "finetuned", layers, [base, (1, 1e-3, "")])
    write(folder / "surrogate", layers, [base, (2, 1e-3, "self_attn")])


if __name__ == "__main__":
    four(Path(sys.argv[1]), int(sys.argv[2]))
