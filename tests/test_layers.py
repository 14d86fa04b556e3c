"""Which part of the package may import which: docs/architecture.md, "Layers"."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "safegraft"
FOUNDATION = {"errors", "registry", "config", "manifest", "naming", "hardware", "runs", "__version__"}
ALLOWED = {
    "errors": set(),
    "registry": {"errors"},
    "config": {"errors"},
    "manifest": {"__version__"},
    "naming": set(),
    "hardware": set(),
    "runs": {"errors"},
    "data": FOUNDATION,
    "tensors": FOUNDATION,
    "merging": FOUNDATION | {"tensors"},
    "train": FOUNDATION | {"tensors", "data"},
    "evaluate": FOUNDATION | {"data"},
    "report": FOUNDATION,
    "distilling": FOUNDATION | {"tensors", "train", "evaluate", "data"},
    "reasoning": FOUNDATION | {"tensors", "train", "evaluate", "data"},
    "masking": FOUNDATION | {"tensors", "merging", "train", "evaluate", "data"},
    "tuning": FOUNDATION | {"tensors", "merging", "train", "evaluate", "data"},
}
ATTACKS = [f"evaluate/attacks/{name}.py" for name in ("base", "ciphers", "disguise", "framings", "loops", "shots")]
PURE = ["agreement", "metrics", "summary", "thinking"]
NO_IO = [
    "reasoning/segment.py",
    "merging/linalg.py",
    "merging/entries.py",
    "merging/fusion.py",
    "tensors/masking.py",
    *(f"evaluate/{name}.py" for name in PURE),
    *ATTACKS,
]


def part(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Parts of safegraft that a file imports at run time (imports for type checkers alone do not count)."""
    package = ["safegraft", *file.relative_to(ROOT).with_suffix("").parts[:-1]]
    if file.name == "__init__.py":
        package = ["safegraft", *file.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(file.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            dotted = [*origin, *(node.module or "").split(".")] if node.module else origin
            targets = [dotted] if node.module else [[*dotted, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {t[1] for t in targets if t[0] == "safegraft" and len(t) > 1}
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down_only(file):
    own = part(file)
    if own in ALLOWED:
        assert imports(file) - {own} <= ALLOWED[own]
    else:
        assert own in {"__init__", "__main__", "cli", "demo", "guarding"}, (
            f"{own} is a new part: give it its layer here"
        )


@pytest.mark.parametrize("name", NO_IO)
def test_pure_files_do_no_io(name):
    text = (ROOT / name).read_text()
    names = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
    assert not names & {"open", "print", "Path", "os"}


def test_importing_the_package_loads_no_torch():
    code = "import safegraft, safegraft.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_exist():
    import safegraft

    for name in safegraft.__all__:
        assert getattr(safegraft, name) is not None
    assert callable(safegraft.merge)
