"""The published merge written as plainly as its text: four models in memory, full SVDs, the whole bracket.

    python benchmarks/published.py FINE_TUNE BASE ALIGNED UNALIGNED OUT [all|changed]

The models are loaded and saved with transformers, and as the text says, every 2-D tensor is decomposed; with
``changed``, only those the safety vector changes, which is the least that a plain program could do and still be right.
It is what `benchmarks/merge.py` measures Safegraft against.
EnchTable, arXiv:2511.09880.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


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
    models = [load(folder) for folder in (fine, base, aligned, unaligned)]
    w_t, w_b, w_s, w_h = ({n: p.detach() for n, p in model.named_parameters()} for model in models)
    task = {n: w_t[n] - w_b[n] for n in w_t}
    delta = {n: w_s[n] - w_h[n] for n in w_t}
    norm = lambda d: torch.sqrt(sum((t.double() ** 2).sum() for t in d.values()))  # noqa: E731
    alpha = float(0.1 * norm(task) / norm(delta))
    for n in w_t:
        s = alpha * delta[n]
        weight = 1.0
        if s.dim() == 2 and (which == "all" or bool(s.any())):
            weight = torch.exp(torch.tensor(-interference(task[n], s))).item()
        w_t[n].add_(weight * s)
    models[0].save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
