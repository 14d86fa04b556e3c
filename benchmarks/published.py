"""The published merge written as plainly as its text: four models in memory, full SVDs, the whole bracket.

    python benchmarks/published.py FINE_TUNE BASE ALIGNED UNALIGNED OUT [all|changed]

As the text says, every 2-D tensor is decomposed; with ``changed``, only those the safety vector changes, which is the
least that a plain program could do and still be right. It is what `benchmarks/merge.py` measures Safegraft against.
EnchTable, arXiv:2511.09880.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def load(folder: str) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = {}
    for shard in sorted(Path(folder).glob("*.safetensors")):
        model.update(load_file(shard))
    return {name: tensor.float() for name, tensor in model.items()}


def interference(task: torch.Tensor, safety: torch.Tensor, keep: float = 0.5, c: float = 200.0) -> float:
    k = int(keep * min(task.shape))
    u1, s1, v1 = torch.linalg.svd(task, full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(safety, full_matrices=False)
    u = torch.cat([u1[:, :k], u2[:, :k]], dim=1)
    s = torch.diag(torch.cat([s1[:k], s2[:k]]))
    v = torch.cat([v1[:k].T, v2[:k].T], dim=1)
    one = torch.eye(2 * k)
    return c / (2 * k) ** 2 * float(((u.T @ u - one) @ s @ (v.T @ v - one)).abs().sum())


def main(fine: str, base: str, aligned: str, unaligned: str, out: str, which: str = "all") -> None:
    w_t, w_b, w_s, w_h = load(fine), load(base), load(aligned), load(unaligned)
    task = {n: w_t[n] - w_b[n] for n in w_t}
    delta = {n: w_s[n] - w_h[n] for n in w_t}
    norm = lambda d: torch.sqrt(sum((t.double() ** 2).sum() for t in d.values()))  # noqa: E731
    alpha = float(0.1 * norm(task) / norm(delta))
    merged = {}
    for n in w_t:
        s = alpha * delta[n]
        weight = 1.0
        if s.dim() == 2 and (which == "all" or bool(s.any())):
            weight = torch.exp(torch.tensor(-interference(task[n], s))).item()
        merged[n] = w_t[n] + weight * s
    Path(out).mkdir(parents=True)
    save_file(merged, Path(out) / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(Path(fine) / "config.json", out)


if __name__ == "__main__":
    main(*sys.argv[1:])
