"""Help waits for no torch: no command's help or usage error imports it, and what help shows is what there is."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_args

import pytest

from docs_tools.reference import subparsers
from sfumato.cli import names
from sfumato.cli.job_flags import GROUPS, kind_of
from sfumato.cli.main import COMMANDS, parser
from sfumato.diffusion.noise import SOURCES
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import SCHEDULES
from sfumato.evaluate import features, resizing
from sfumato.families import FAMILIES
from sfumato.images import UPSCALERS, moving
from sfumato.images.annotate import ANNOTATORS
from sfumato.images.fitting import FITS
from sfumato.models import beside, hypernetwork
from sfumato.pipeline import PRECISIONS
from sfumato.prompts.weighting import WEIGHTINGS
from sfumato.tasks import checks, picture_checks, pictures, previews
from sfumato.tasks.plot import field_kinds
from sfumato.train import consistency, controlnet, inversion, lora
from sfumato.train.data import bucketed, duplicates, filtering, writing
from sfumato.weights.adapters.writing import LAYOUTS

HEAVY = ("torch", "scipy", "tokenizers", "polars", "fastapi")
SCRIPT = """
import contextlib, io, json, sys
from sfumato.cli.main import main
told = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    told.append((words, code, heavy, out.getvalue()))
print(json.dumps(told))
"""


def asked(*lines: list[str]) -> list[tuple[list[str], int, list[str], str]]:
    """Each command line, its exit code, the heavy modules that are loaded by then, and what it printed."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(lines), json.dumps(HEAVY)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(run.stdout)


def test_no_help_and_no_usage_error_waits_for_torch():
    """Of every command, and of every command of a command."""
    light = [(name, sub) for name, sub in subparsers(parser())]
    inner = [(name, action) for name, sub in light for action, _ in subparsers(sub)]
    assert {"lora", "diffusion", "new"} <= {action for name, action in inner if name == "train"}
    helps = [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name, _ in light),
        *([*pair, "--help"] for pair in inner),
    ]
    wrong = [[], ["no-such-command"], *([name, "--no-such-flag"] for name, _ in light)]
    found = asked(*helps, *wrong)
    assert [(words, heavy) for words, _, heavy, _ in found if heavy] == []
    assert [words for words, code, _, text in found[: len(helps)] if code != 0 or not text] == []
    assert [words for words, code, _, text in found[len(helps) :] if code != 2 or "error:" not in text] == []
    examples = {words[0]: " ".join(text.split()) for words, _, _, text in found[: len(helps)] if len(words) == 2}
    assert [name for name, text in examples.items() if f"example: sfumato {name} " not in text] == []
    assert len(examples) == len(COMMANDS)


OWNERS = {
    "SAMPLERS": SAMPLERS,
    "SCHEDULES": SCHEDULES,
    "FAMILIES": FAMILIES,
    "SOURCES": SOURCES,
    "WEIGHTINGS": WEIGHTINGS,
    "UPSCALERS": UPSCALERS,
    "LATENT_UPSCALERS": checks.LATENT_UPSCALERS,
    "FITS": FITS,
    "FILLS": picture_checks.FILLS,
    "FORMATS": moving.FORMATS,
    "PREVIEWS": previews.KINDS,
    "PICTURES": pictures.PICTURES,
    "ANNOTATORS": ANNOTATORS,
    "FEATURES": features.FEATURES,
    "RESIZERS": resizing.RESIZERS,
    "LAYOUTS": LAYOUTS,
    "HASHES": duplicates.HASHES,
    "ADAPTERS": get_args(beside.Kind),
    "TARGETS": lora.TARGETS,
    "TEMPLATES": inversion.TEMPLATES,
    "ACTIVATIONS": hypernetwork.ACTIVATIONS,
    "WEIGHT_INITS": hypernetwork.WEIGHT_INITS,
    "CROPS": bucketed.CROPS,
    "COMPUTED": ("autocast", *PRECISIONS),
}
NUMBERS = {
    "MOST_BITS": duplicates.MOST,
    "PER_SHARD": writing.PER_SHARD,
    "HINT_CAPTION_DROP": controlnet.CAPTION_DROP,
    "LCM_RANK": consistency.LCM_LORA.rank,
    "LCM_SOLVER_STEPS": consistency.ConsistencyConfig.solver_steps,
}


@pytest.mark.parametrize("name", sorted(OWNERS))
def test_the_names_are_their_owners(name):
    assert getattr(names, name) == tuple(OWNERS[name])


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_the_numbers_are_their_owners(name):
    assert getattr(names, name) == NUMBERS[name]


def test_the_texts_are_their_owners():
    assert {name: preset.about for name, preset in filtering.PRESETS.items()} == names.PRESETS
    options: dict[str, list[str]] = {}
    for name, each in ANNOTATORS.items():
        for option in each.options:
            options.setdefault(option.name, []).append(f"{name}: {option.what} ({option.default})")
    assert {name: "; ".join(texts) for name, texts in options.items()} == names.ANNOTATOR_OPTIONS


def test_the_precisions_are_those_that_can_be_written():
    from sfumato.cli.convert import dtype_of

    assert [str(dtype_of(name)) for name in names.PRECISIONS] == ["torch.float32", "torch.float16", "torch.bfloat16"]
    assert dtype_of(None) is None


def test_the_ranges_are_those_that_are_checked():
    """Of every number but those whose range a flag's own line tells in words."""
    flags = {name: flag for group in GROUPS.values() for name, flag in group.items()}
    told = {name: flag.allowed for name, flag in flags.items() if name in checks.RANGES and flag.allowed}
    assert sorted(told) == ["ensd", "seed", "variation_seed"]
    ranges = {name: f"{each.low:g} to {each.high:g}" for name, each in checks.RANGES.items()}
    assert {name: text for name, text in ranges.items() if name not in told} == names.RANGES


def test_the_kinds_of_fields_are_their_types():
    written = {name: kind_of(name).partition("[")[0].removeprefix("Control, ") for name in field_kinds()}
    assert written == {name: kind.type.__name__ for name, kind in field_kinds().items()}


def test_every_name_is_held_to_its_owner():
    public = {name for name in vars(names) if name.isupper() and not name.startswith("_")}
    assert public == {*OWNERS, *NUMBERS, "PRESETS", "ANNOTATOR_OPTIONS", "PRECISIONS", "COMPUTED_HELP", "RANGES"}
