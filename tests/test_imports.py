"""Who may import whom: services import `shared` and never each other, and the light ones start without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVICES = sorted(folder.name for folder in (ROOT / "services").iterdir() if (folder / "__main__.py").exists())
DECIDING = sorted((ROOT / "services" / "controller" / "policy").glob("*.py"))


def imported_by(folder: Path) -> set[str]:
    """The full names of all modules that files in `folder` import, anywhere in them."""
    return {name for file in folder.rglob("*.py") for name in imported_by_file(file)}


def imported_by_file(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_other(service: str) -> None:
    others = {name for name in imported_by(ROOT / "services" / service) if name.startswith("services.")}
    assert all(name.startswith(f"services.{service}") for name in others), others


def test_shared_imports_neither_services_nor_the_command() -> None:
    assert not {name for name in imported_by(ROOT / "shared") if name.split(".")[0] in ("services", "pdserve", "bench")}


@pytest.mark.parametrize(
    "module",
    [
        "services.gateway.__main__",
        "services.controller.__main__",
        "pdserve.up",
        "pdserve.status",
        "pdserve.admin",
        "pdserve.chat",
    ],
)
def test_it_starts_without_torch(module: str) -> None:
    check = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'huggingface_hub'}} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert loaded.stdout.strip() == ""


@pytest.mark.parametrize(
    "policy",
    [
        "gateway/routing.py",
        "gateway/prefix_affinity.py",
        "gateway/scenario_labels.py",
        *(f"controller/policy/{file.name}" for file in DECIDING),
    ],
)
def test_policies_import_no_client_library(policy: str) -> None:
    imported = {name.split(".")[0] for name in imported_by_file(ROOT / "services" / policy)}
    assert not imported & {"nats", "redis", "httpx", "asyncio", "torch"}
