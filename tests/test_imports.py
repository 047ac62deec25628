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
        "services/gateway/routing.py",
        "shared/prefix_affinity.py",
        "shared/prefix_keys.py",
        "shared/scenario_labels.py",
        *(f"services/controller/policy/{file.name}" for file in DECIDING),
    ],
)
def test_policies_import_no_client_library(policy: str) -> None:
    imported = {name.split(".")[0] for name in imported_by_file(ROOT / policy)}
    assert not imported & {"nats", "redis", "httpx", "asyncio", "torch"}


GATEWAY = ROOT / "services" / "gateway"
READING_LIST = (
    "services/gateway/openai/handler.py",
    "services/gateway/openai/completion.py",
    "services/gateway/openai/sse.py",
    "services/gateway/request.py",
    "services/gateway/dispatcher.py",
    "services/gateway/slot_queue.py",
    "services/gateway/instance_client.py",
    "services/gateway/events.py",
)
"""The files through which docs/architecture.md takes a reader, from HTTP to token."""


def folder_of(module: str) -> str:
    """The folder of a module of `shared` or of a service, as a unit of layering."""
    parts = module.split(".")
    return ".".join(parts[:2]) if (ROOT / Path(*parts[:2])).is_dir() else module


def test_folders_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for package in ("shared", "services", "pdserve"):
        for file in (ROOT / package).rglob("*.py"):
            own = folder_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
            imported = {folder_of(name) for name in imported_by_file(file) if name.split(".")[0] == package}
            graph.setdefault(own, set()).update(imported - {own, package})
    done: set[str] = set()
    while ready := {
        name for name, imported in graph.items() if name not in done and not (imported & graph.keys()) - done
    }:
        done |= ready
    assert done == graph.keys(), {name: (graph[name] & graph.keys()) - done for name in graph.keys() - done}


def num_code_lines(file: Path) -> int:
    """The lines of a file that are no blank lines, comments or docstrings."""
    text = file.read_text()
    prose = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and number not in prose for number, line in lines)


def test_a_reader_follows_a_request_through_few_lines() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    assert all(f"`{file}`" in page or f"`{Path(file).name}`" in page for file in READING_LIST)
    num_lines = sum(num_code_lines(ROOT / file) for file in READING_LIST)
    assert num_lines <= 1300, num_lines


def test_the_gateway_has_few_files() -> None:
    assert len(list(GATEWAY.rglob("*.py"))) <= 26


def test_no_async_generator_wraps_another_in_the_gateway() -> None:
    """Tokens are pushed into a request's output. An async generator is only ever a context manager."""
    for file in GATEWAY.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.AsyncFunctionDef) and any(isinstance(one, ast.Yield) for one in ast.walk(node)):
                names = [one.id for one in node.decorator_list if isinstance(one, ast.Name)]
                assert names == ["asynccontextmanager"], f"{file}: {node.name}"
