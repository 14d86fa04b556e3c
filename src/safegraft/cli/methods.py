"""safegraft methods"""

from __future__ import annotations

from .console import stdout


def command() -> None:
    """List the merge methods with their parameters, defaults and papers."""
    from ..merging import methods as _methods
    from ..merging.method import METHODS

    _ = _methods
    for name, method in METHODS:
        stdout.print(f"{name}  ({method.paper})", style="bold", highlight=False)
        stdout.print(f"  {method.summary}", highlight=False)
        how = "of ‖τ‖ (--match-norm)" if method.match_norm else "as it is (--raw)"
        takes = "one or several fine-tunes, with or without a vector" if method.fuses else "one fine-tune and a vector"
        if method.needs == "calibration":
            takes, how = "one fine-tune and --calibration (safegraft calibrate BASE), no vector", "(its budget)"
        strength = f"strength {method.strength:g} {how}"
        if method.needs == "mask":
            takes, strength = "one or several fine-tunes and --mask (safegraft somf train), no vector", "no strength"
        stdout.print(f"  takes {takes}; {strength}", highlight=False)
        for key, info in method.params.model_fields.items():
            stdout.print(f"  {key} = {info.default!r}: {info.description}", highlight=False, markup=False)
