"""safegraft inspect"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from .console import note, progress_bar, stdout, warn

if TYPE_CHECKING:
    from ..merging.inspect import Inspection


def command(
    model: str = typer.Option(..., help="The fine-tune: a folder, a Hub id, or a LoRA adapter."),
    base: str = typer.Option(None, help="What it was fine-tuned from (an adapter may name its own)."),
    vector: str = typer.Option(..., help="The safety vector's folder."),
    strength: float = typer.Option(0.1, min=0.0, help="β at which weight and ratio are shown."),
    html: Path = typer.Option(None, help="Also write a heat map, layer by module, to this file."),
    force: bool = typer.Option(False, "--force", help="Replace an existing HTML file."),
) -> None:
    """Show how a fine-tune and a safety vector meet, tensor by tensor; merges nothing."""
    from ..merging.inspect import inspect
    from ..tensors.writer import check_free, write_whole

    if html is not None:
        check_free(html, force=force)
    with progress_bar() as progress:
        found = inspect(model, vector, base=base, strength=strength, progress=progress)
    warn(found.warnings)
    note(found.notes)
    _print(found, strength)
    if html is not None:
        write_whole(html, _page(found, model, strength).encode())
        stdout.print(f"Wrote {html}.", highlight=False)


def _page(found: Inspection, model: str, strength: float) -> str:
    from ..naming import layer_grid
    from ..report.inspection import MAPS, inspection_page

    facts = [
        ("‖τ‖, what fine-tuning changed", f"{found.task_norm:.4g}"),
        ("‖Δ‖, the safety vector", f"{found.safety_norm:.4g}"),
        ("cos(τ, Δ)", "" if found.cosine is None else f"{found.cosine:+.3f}"),
        ("strength β", f"{strength:g}"),
        ("scale α", f"{found.alpha:.4g}"),
        *(("note", text) for text in found.notes),
    ]
    grids = {}
    for figure, _, _ in MAPS:
        values = {row.name: getattr(row, figure) for row in found.tensors}
        grids[figure] = layer_grid({name: value for name, value in values.items() if value is not None})
    title = f"How {Path(model).name} and the safety vector meet"
    return inspection_page(title, facts, found.warnings, grids)


def _print(found: Inspection, strength: float) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("tensor", overflow="fold")
    for column in ("‖W‖", "‖τ‖", "‖Δ‖", "cos(τ,Δ)", "overlap", "I", "w", "I free", "‖w·s‖/‖τ‖"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.tensors:
        table.add_row(
            row.name.removesuffix(".weight"),
            f"{row.base_norm:.3g}",
            f"{row.task_norm:.3g}",
            f"{row.safety_norm:.3g}",
            f"{row.cosine:+.3f}",
            "" if row.overlap is None else f"{row.overlap:.3f}",
            f"{row.interference:.4f}",
            f"{row.weight:.4f}",
            "" if row.opposition is None else f"{row.opposition:.3f}",
            f"{row.ratio:.3g}",
        )
    stdout.print(table)
    cosine = "" if found.cosine is None else f", cos(τ, Δ) {found.cosine:+.3f}"
    stdout.print(
        f"Over all tensors: ‖τ‖ {found.task_norm:.4g}, ‖Δ‖ {found.safety_norm:.4g}{cosine}; "
        f"at strength β {strength:g} the scale α is {found.alpha:.4g}.",
        highlight=False,
    )
