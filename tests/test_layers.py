"""Imports point one way, and the command line starts without anything heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "triton", "ragas", "transformers", "pandas", "datasets"}
ENGINE_ORDER = [
    "errors", "files", "config", "rope", "roofline", "devices", "budget", "blocks", "request", "scheduler", "quant",
    "weights", "footprint", "lora",
    "kernels", "kv", "layers", "model", "quantize", "training", "grammar", "sampling", "steps", "card", "trial",
    "runner", "engine",
]  # fmt: skip


def imports_of(path: Path, *, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_engine_knows_nothing_of_ragate() -> None:
    for path in (ROOT / "engine").rglob("*.py"):
        assert not {m for m in imports_of(path, top_level=False) if m.split(".")[0] == "ragate"}, path


def test_ragate_knows_the_engine_through_its_front_door_only() -> None:
    # these tell what this machine has and what fits it, which the front door does not
    tellers = {"doctor.py", "advise.py", "rates.py", "forecast.py"}
    for path in (ROOT / "ragate").rglob("*.py"):
        inner = {m for m in imports_of(path, top_level=False) if m.startswith("ragate_engine.")}
        assert not inner or path.name in tellers, (path, inner)


def test_no_module_of_ragate_imports_torch_or_triton_at_its_top() -> None:
    for path in (ROOT / "ragate").rglob("*.py"):
        assert not {m.split(".")[0] for m in imports_of(path, top_level=True)} & {"torch", "triton"}, path


def test_engine_modules_import_only_what_stands_before_them() -> None:
    base = ROOT / "engine" / "ragate_engine"
    for path in base.rglob("*.py"):
        own = path.relative_to(base).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for module in imports_of(path, top_level=True):
            parts = module.split(".")
            if parts[0] == "ragate_engine" and len(parts) > 1:
                assert ENGINE_ORDER.index(parts[1]) <= ENGINE_ORDER.index(own), f"{path} imports {module}"


def test_the_command_line_starts_without_anything_heavy() -> None:
    code = "import sys, ragate.cli, ragate.suite, ragate.gate.verdict; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(out.stdout.split())


def test_every_tensor_that_the_engine_makes_has_a_type_of_its_own() -> None:
    # torch's default type is the whole process's: whoever loads a model beside the engine may set it
    makers = {"empty", "zeros", "ones", "full", "rand", "randn", "eye", "linspace"}
    for path in (ROOT / "engine" / "ragate_engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in makers}:
                assert "dtype" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
