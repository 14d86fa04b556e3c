"""Time and peak memory of the same merge by Safegraft and by mergekit, in one run.

    python benchmarks/peers.py [--models DIR] [--runs 3]

DIR holds finetuned/, base/ and surrogate/ as for merge.py (made in bench-out/ without it); the surrogate is fused with
the fine-tune. Needs the extra `mergekit`. Ratios are between medians of runs taken in turn.
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from merge import make, measure

METHODS = {"task_arithmetic": "", "ties": ", density: 0.5"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    work = Path("bench-out/peers")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    models = arguments.models or work / "models"
    if arguments.models is None:
        make(models, 30)
    print(f"{'method':18}{'program':12}{'wall':>8}{'peak RSS':>11}{'wall / ours':>13}{'memory / ours':>15}")
    for method, more in METHODS.items():
        config = work / f"{method}.yaml"
        rows = "".join(
            f"  - {{model: {(models / name).resolve()}, parameters: {{weight: 0.5{more}}}}}\n"
            for name in ("finetuned", "surrogate")
        )
        base = (models / "base").resolve()
        config.write_text(f"merge_method: {method}\nbase_model: {base}\nmodels:\n{rows}dtype: float32\n")
        ours, theirs = work / "ours", work / "theirs"
        programs = {
            "safegraft": ["-m", "safegraft", "merge", "--from-mergekit", str(config), "--out", str(ours)],
            "mergekit": ["-m", "mergekit.scripts.run_yaml", str(config), str(theirs), "--no-copy-tokenizer"],
        }
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for _ in range(arguments.runs):
            for name, command in programs.items():
                shutil.rmtree(ours, ignore_errors=True)
                shutil.rmtree(theirs, ignore_errors=True)
                seen[name].append(measure([sys.executable, *command]))
        wall = {name: statistics.median(w for w, _ in found) for name, found in seen.items()}
        peak = {name: max(p for _, p in found) for name, found in seen.items()}
        for name in programs:
            print(
                f"{method:18}{name:12}{wall[name]:7.1f}s{peak[name]:8.0f} MB"
                f"{wall[name] / wall['safegraft']:12.1f}×{peak[name] / peak['safegraft']:14.1f}×"
            )


if __name__ == "__main__":
    main()
