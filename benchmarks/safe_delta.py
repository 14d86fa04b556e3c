"""Safe Delta beside the demo's vector: complied with, look-alikes refused, task, at several budgets.

    python benchmarks/safe_delta.py DEMO WORK [--budgets 0.002 0.0026 0.004]

DEMO is what `safegraft demo --out DEMO` left. The aligned model's activations are measured on the starter set's harmful
requests, and the fine-tune is cut back at every budget; each model answers the demo's report prompts. The calibration
in WORK is made once.
"""

import argparse
import shutil
from pathlib import Path

from safegraft import merge
from safegraft.demo.measure import look
from safegraft.demo.settings import Settings, starter_data
from safegraft.evaluate.metrics import Rate
from safegraft.evaluate.models.hf import load_chat
from safegraft.train.calibrate import calibrate


def shown(rate: Rate) -> str:
    return f"{rate.value:.0%} ({rate.low:.0%}–{rate.high:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.001, 0.0015, 0.002, 0.0023, 0.0026, 0.003, 0.004]
    )
    args = parser.parse_args()
    aligned, tuned, cut = args.demo / "aligned", args.demo / "finetuned", args.work / "cut"
    settings = Settings()
    prompts = starter_data(settings, 0).report
    args.work.mkdir(parents=True, exist_ok=True)
    calibration = args.work / "calibration"
    if not calibration.is_dir():
        calibrate(aligned, calibration)

    def measured(label: str, folder: Path) -> None:
        scores = look(*load_chat(folder), label, prompts, settings, lambda *_: None)
        told = " | ".join(shown(rate) for rate in (scores.complies, scores.refuses, scores.task))
        print(f"| {label} | {told} |", flush=True)

    print("| model | harmful requests complied with | harmless look-alikes refused | task |\n|---|---|---|---|")
    for label, folder in (("aligned", aligned), ("fine-tuned", tuned), ("restored", args.demo / "restored")):
        measured(label, folder)
    for budget in args.budgets:
        shutil.rmtree(cut, ignore_errors=True)
        merge(tuned, None, cut, base=aligned, method="safe_delta", calibration=calibration, strength=budget)
        measured(f"Safe Delta, {budget:g}", cut)
    shutil.rmtree(cut, ignore_errors=True)


if __name__ == "__main__":
    main()
