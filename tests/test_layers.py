"""The import rule: downward only, held by reading every import of sfumato/ with `ast`. Nothing is imported here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sfumato"

# From bottom to top. Layers of one line are neighbours and know nothing of one another.
LAYERS = (
    ("types",),
    ("images",),
    ("kernels",),
    ("models",),
    ("diffusion",),
    ("prompts",),
    ("families",),
    ("weights",),
    ("memory",),
    ("engine",),
    ("tasks",),
    ("pipeline",),
    ("safety",),
    ("diffusers_style",),
    ("train", "evaluate", "server"),
    ("batch",),
    ("cli",),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
FORBIDDEN = {
    "models": set(HEIGHT) - {"models", "kernels"},
    "kernels": set(HEIGHT) - {"kernels"},
    "diffusion": {"models"},
}  # beyond what the order forbids
PEERS = {
    "diffusers",
    "transformers",
    "accelerate",
    "k_diffusion",
    "torchvision",
    "open_clip",
    "clip",
    "lycoris",
    "compel",
    "peft",
    "ldm",
}
FILES = sorted(ROOT.rglob("*.py"))


def imported(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """Full dotted names that a module imports, wherever in it, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                base = ".".join([*kept, base]) if base else ".".join(kept)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(path: Path, source: str) -> list[str]:
    """What a file at `path`, relative to sfumato/, does against the rules."""
    names = path.with_suffix("").parts
    is_package = names[-1] == "__init__"
    module = ".".join(("sfumato", *names[: len(names) - is_package]))
    own = module.split(".")[1] if "." in module else ""  # "": the package's own __init__, below everything
    tree = ast.parse(source)
    found = []
    if own and own not in HEIGHT:
        found.append(f"{module} belongs to no layer")
    for name in imported(tree, module, is_package):
        top, _, rest = name.partition(".")
        if top in PEERS:
            found.append(f"{module} imports the peer {top}")
        other = rest.split(".")[0]
        if top != "sfumato" or not other or other == own:
            continue
        if other not in HEIGHT:
            if (ROOT / other).is_dir() or (ROOT / f"{other}.py").is_file():
                found.append(f"{module} imports {other}, which belongs to no layer")
        elif HEIGHT[other] >= HEIGHT.get(own, -1) or other in FORBIDDEN.get(own, ()):
            found.append(f"{module} imports {other}")
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    if own != "cli" and any(isinstance(call.func, ast.Name) and call.func.id in ("print", "pprint") for call in calls):
        found.append(f"{module} prints")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_rules_hold(path: Path) -> None:
    assert violations(path.relative_to(ROOT), path.read_text(encoding="utf-8")) == []


def test_all_of_the_package_is_read() -> None:
    assert {"types.py", "engine.py", "pipeline.py"} <= {path.name for path in FILES if path.parent == ROOT}
    assert len(FILES) > 30


@pytest.mark.parametrize(
    "path, source, message",
    [
        ("types.py", "from sfumato.images import grid", "sfumato.types imports images"),
        ("models/unet.py", "from sfumato.types import Cond", "sfumato.models.unet imports types"),
        ("models/unet.py", "import sfumato.images", "sfumato.models.unet imports images"),
        ("diffusion/denoiser.py", "from sfumato.models.unet import UNet", "sfumato.diffusion.denoiser imports models"),
        ("diffusion/__init__.py", "from ..models import unet", "sfumato.diffusion imports models"),
        ("families/box.py", "from sfumato.weights import files", "sfumato.families.box imports weights"),
        ("engine.py", "def f():\n    from sfumato import tasks", "sfumato.engine imports tasks"),
        ("engine.py", "from .tasks import txt2img", "sfumato.engine imports tasks"),
        ("tasks/txt2img.py", "from sfumato.pipeline import Pipeline", "sfumato.tasks.txt2img imports pipeline"),
        ("train/loop.py", "from sfumato.server import queue", "sfumato.train.loop imports server"),
        ("server/http.py", "from sfumato.cli.main import main", "sfumato.server.http imports cli"),
        ("__init__.py", "from sfumato.pipeline import Pipeline", "sfumato imports pipeline"),
        ("helpers.py", "", "sfumato.helpers belongs to no layer"),
        ("weights/files.py", "import diffusers.models", "sfumato.weights.files imports the peer diffusers"),
        ("cli/main.py", "from transformers import CLIPModel", "sfumato.cli.main imports the peer transformers"),
        ("train/loop.py", "def f():\n    print(1)", "sfumato.train.loop prints"),
    ],
)
def test_a_breach_is_found(path: str, source: str, message: str) -> None:
    assert violations(Path(path), source) == [message]


@pytest.mark.parametrize(
    "path, source",
    [
        ("models/unet.py", "import torch\nfrom sfumato.models.layers import attend\nfrom .layers import zero"),
        ("diffusion/guidance.py", "from sfumato.types import Cond"),
        ("families/family.py", "from sfumato.models.unet import UNetConfig\nfrom sfumato import diffusion"),
        ("cli/main.py", "from sfumato import __version__, pipeline, server\nprint(1)"),
        ("weights/files.py", "from sfumato.weights import checkpoint"),
    ],
)
def test_what_is_allowed_is_not_a_breach(path: str, source: str) -> None:
    assert violations(Path(path), source) == []
