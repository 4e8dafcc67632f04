"""Every public function, class and method of sfumato says in a line what it is. Read with `ast`; nothing is imported.

A method that a Protocol of ours, or torch, describes already needs no words of its own. Whether shapes, ranges and
errors are told well is for people to judge.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sfumato"
FILES = sorted(ROOT.rglob("*.py"))
KNOWN = {"forward", "backward"}  # torch's
# Still silent, by name; write a line and take the name out.
SILENT = {
    "diffusers_style/pipeline.py": (
        "StableDiffusionPipeline.device StableDiffusionPipeline.unet StableDiffusionPipeline.vae "
        "StableDiffusionPipeline.text_encoder StableDiffusionPipeline.tokenizer "
        "StableDiffusionPipeline.disable_attention_slicing StableDiffusionPipeline.disable_vae_slicing "
        "StableDiffusionPipeline.disable_vae_tiling"
    ),
    "evaluate/features.py": "Network.device",
    "families/family.py": "Family.to_json",
    "families/model.py": "Model.precision",
    "images/annotate/registry.py": "Option.whole",
    "memory/moving.py": "Unit.away",
    "models/autoencoder.py": "Posterior.std ResnetBlock Middle Encoder Decoder",
    "models/clip.py": (
        "SelfAttention MLP EncoderLayer TransformerEncoder TextEmbeddings TextModel VisionEmbeddings VisionModel"
    ),
    "models/deltas.py": "LoRA.rank LoHa.rank LoKr.rank GLoRA.rank DoRA.rank",
    "models/layers.py": "Embedding.reset_parameters",
    "models/t2i_adapter.py": "LightResBlock",
    "models/unet.py": "ResBlock Downsample",
    "safety/provenance.py": "Report.sound",
    "server/desk.py": "Desk.model_name",
    "server/logs.py": "Lines.format",
    "server/queue.py": "Queue.close Queue.paused",
    "server/worker.py": "Worker.alive",
    "tasks/diffusers_scheduler.py": "Scheduler.spacing",
    "weights/adapters/groups.py": "Scale.factor",
    "weights/adapters/wearing.py": "Worn.strength",
    "weights/files/__init__.py": "TensorFile.shape",
    "weights/files/unpickle.py": (
        "Window.readline Machine.mark Machine.pop Machine.extend Machine.set_items Machine.put "
        "Machine.global_ Machine.inst Machine.obj Machine.persistent Machine.build"
    ),
    "weights/layouts/diffusers_fields.py": "Fields.wrong Fields.all_only Fields.number Fields.names",
    "weights/parts.py": "Checkpoint.family",
}
Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def defined(tree: ast.Module) -> Iterator[tuple[str, Named]]:
    """Public functions and classes of a module, and public methods of its public classes, with their names."""
    for node in tree.body:
        if isinstance(node, Named) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Named) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


def is_protocol(node: ast.ClassDef) -> bool:
    bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return any(getattr(base, "id", getattr(base, "attr", "")) == "Protocol" for base in bases)


def described() -> set[str]:
    """Names of the methods of the package's Protocols that say what they are."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and is_protocol(node) and ast.get_docstring(node):
                names |= {inner.name for inner in node.body if isinstance(inner, Named)}
    return names


DESCRIBED = described()


def needs_none(node: Named) -> bool:
    """Whether a function is a stub, an overload, or the one that a Protocol or torch describes."""
    if isinstance(node, ast.ClassDef):
        return False
    marks = {getattr(mark, "attr", getattr(mark, "id", "")) for mark in node.decorator_list}
    is_stub = len(node.body) == 1 and isinstance(node.body[0], ast.Expr) and is_dots(node.body[0].value)
    return is_stub or bool(marks & {"overload", "setter"})


def is_dots(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def silent(source: str) -> list[str]:
    """What is public in a module and says nothing, or whose first paragraph is no sentence."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for name, node in defined(tree):
        if needs_none(node) or ("." in name and node.name in DESCRIBED | KNOWN):
            continue
        text = ast.get_docstring(node)
        if text is None:
            found.append(name)
        elif not text.split("\n\n")[0].rstrip().endswith((".", ":", "!", "?", "`", ")")):
            found.append(f"{name}: its summary has no end")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_public_says_what_it_is(path):
    kept = SILENT.get(path.relative_to(ROOT).as_posix(), "").split()
    assert [name for name in silent(path.read_text(encoding="utf-8")) if name not in kept] == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("", []),
        ("x = 1", ["the module"]),
        ('"""M."""\ndef f(): return 1', ["f"]),
        ('"""M."""\ndef _f(): return 1', []),
        ('"""M."""\ndef f():\n    """Text without end"""', ["f: its summary has no end"]),
        ('"""M."""\nclass C:\n    """C."""\n    def f(self): return 1', ["C.f"]),
        ('"""M."""\nclass C:\n    """C."""\n    def f(self): ...\n    def forward(self, x): return x', []),
        ('"""M."""\nclass C:\n    def __len__(self): return 1', ["C"]),
    ],
)
def test_what_says_nothing_is_found(source, found):
    assert silent(source) == found
