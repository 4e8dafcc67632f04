"""Programs beside the package (benchmarks, recipes, docs_tools, examples) name only what is there to be imported."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"sfumato", "benchmarks", "recipes", "docs_tools", "tests"}
PROGRAMS = sorted(
    path for folder in ("benchmarks", "recipes", "docs_tools", "examples") for path in (ROOT / folder).rglob("*.py")
)


def there(module, name):
    """Whether `from module import name` finds something."""
    if importlib.util.find_spec(module) is None:
        return False
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_of_ours_are_there(path):
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            try:
                missing += [f"{node.module}.{each.name}" for each in node.names if not there(node.module, each.name)]
            except ModuleNotFoundError as error:
                missing.append(f"{node.module}: {error}")
    assert missing == []
