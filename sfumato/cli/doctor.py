"""Tell what is here, what would be chosen and why, and draw a test picture. Exit code 1 where something is not well.

Nothing is changed or sent anywhere. Works without torch, to say that it is missing: so what needs it is imported late.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from sfumato.cli.names import COMPUTED, COMPUTED_HELP

Facts = dict[str, Any]

NEEDED = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "tqdm", "scipy", "torchsde")
FOR_MAKERS = ("test", "docs", "bench", "recipe")  # extras of people who change the program
GIB = 2**30
ENOUGH_FREE = GIB  # bytes on the disk
TEST_SECONDS = 10.0
PROMPT = "a red apple on a white background"
TEST: Facts = {"prompt": PROMPT, "seed": 42, "steps": 6, "guidance": 4.0, "sampler": "ddim"}
TEST_MODEL = "a3d3e0238a"  # the box's hash
# Mean colours of the test picture's 4 x 4 parts, rows from the top; drawn in float32 on one CPU thread.
EXPECTED = (
    (238, 251, 242), (144, 219, 154), (213, 230, 200), (253, 253, 251),
    (237, 164, 174), (226, 41, 31), (234, 58, 28), (255, 176, 166),
    (230, 126, 137), (243, 51, 42), (253, 57, 32), (254, 154, 148),
    (251, 235, 238), (233, 126, 148), (243, 150, 166), (254, 248, 249),
)  # fmt: skip
NEAR = {
    "float32": 2.0,
    "bfloat16": 4.0,
    "float16": 3.0,
}  # of 255, the most that a part may differ; on a CPU 0.5, 1, 0.5


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato doctor`."""
    add = parser.add_argument
    add("--device", metavar="NAME", help="look at this one: cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--precision", choices=COMPUTED, default="autocast", help=COMPUTED_HELP)
    add("--no-test", action="store_true", help="draw no test picture")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    report = examine(args.device, args.precision, not args.no_test)
    print(json.dumps(report, indent=1) if args.json else "\n".join(told(report)))
    return 1 if report["problems"] else 0


def examine(device: str | None = None, precision: str = "autocast", test: bool = True) -> Facts:
    """All that there is to tell. `problems` are lines about what does not work, `advice` about what could be better.

    ValueError where the device is unknown or absent.
    """
    report: Facts = {"versions": versions(), "machine": machine(), "extras": extras()}
    problems = [
        f"{name} is missing: pip install {name}" for name in NEEDED if report["versions"].get(name) == "missing"
    ]
    try:
        importlib.import_module("sfumato.pipeline")
    except (ImportError, OSError) as error:  # a library that is missing, or whose own parts are
        problems.append(f"sfumato cannot be used: {' '.join(str(error).split())}")
        return report | {"problems": problems, "advice": []}
    report["machine"] |= {"devices": devices(), "instructions": instructions(), "kernels": kernels()}
    report["choice"] = choice(device, precision)
    report["places"] = places()
    report["fits"] = fits(report["choice"]["device"])
    if test:
        report["self-test"] = self_test(report["choice"]["device"], precision)
        if problem := report["self-test"].get("problem"):
            problems.append(f"self-test: {problem}")
    return report | {"problems": problems, "advice": advice(report)}


def versions() -> dict[str, str]:
    """Python's, the system's, Sfumato's and its libraries' versions; "missing" for those that are not there."""
    from sfumato import __version__

    found = {"sfumato": __version__, "python": platform.python_version(), "system": platform.platform()}
    return found | {name: _version(name) or "missing" for name in NEEDED}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine() -> Facts:
    """Cores and memory; `usable cores` are those that this process may run on, None where the system does not say."""
    facts: Facts = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts["usable cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        facts["memory GiB"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1)
    facts["free disk GiB"] = round(shutil.disk_usage(Path.cwd()).free / GIB, 1)
    return facts


def instructions() -> str:
    """What the CPU's kernels are made for, such as AVX2."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def kernels() -> str:
    """Whether `--fast` and trainings have compiled kernels here, or why not; compiles nothing."""
    from sfumato.kernels.build import state

    return state()


def devices() -> list[Facts]:
    """The devices that torch can use: name, kind and GiB."""
    import torch

    found: list[Facts] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        kind = f"{card.name}, capability {card.major}.{card.minor}"
        found.append({"name": f"cuda:{index}", "kind": kind, "GiB": round(card.total_memory / GIB, 1)})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "kind": "Apple's GPU", "GiB": round(torch.mps.recommended_max_memory() / GIB, 1)})
    return [*found, {"name": "cpu", "kind": platform.processor() or platform.machine(), "GiB": None}]


def choice(device: str | None, precision: str) -> Facts:
    """Device, precision and threads that drawing would take, and why. ValueError where the device is not there."""
    import torch

    from sfumato.pipeline import choose_device, choose_dtype, has_bfloat16

    chosen = choose_device(device)
    dtype = str(choose_dtype(precision, chosen)).removeprefix("torch.")
    if device is not None:
        why_device = "--device says so"
    elif chosen.type == "cpu":
        why_device = "this torch is built for the CPU" if _is_cpu_build() else "torch finds no GPU"
    else:
        why_device = "torch finds a GPU"
    usual = (
        "half precision is faster on a GPU"
        if chosen.type != "cpu"
        else ("float32 is exact; bf16 is quicker here" if has_bfloat16() else "half precision is slower on this CPU")
    )
    threads, said = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    return {
        "device": str(chosen), "why this device": why_device,
        "precision": dtype,
        "why this precision": usual if precision == "autocast" else f"--precision {precision} says so",
        "threads": threads,
        "why so many threads": f"OMP_NUM_THREADS={said}" if said else "torch takes one for each core that it may use",
    }  # fmt: skip


def _is_cpu_build() -> bool:
    import torch

    return torch.version.cuda is None and getattr(torch.version, "hip", None) is None


def extras() -> Facts:
    """Each optional extra: the version of every library of it that is there, what is missing, and how to get it."""
    wanted: dict[str, list[str]] = {}
    try:
        lines = metadata.requires("sfumato") or []
    except metadata.PackageNotFoundError:
        return {}
    for line in lines:
        found = re.match(r"([A-Za-z0-9_.-]+).*;.*extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if found and found[1] != "sfumato" and found[2] not in FOR_MAKERS:
            wanted.setdefault(found[2], []).append(found[1])
    return {
        name: {
            "there": {each: version for each in libraries if (version := _version(each))},
            "missing": [each for each in libraries if _version(each) is None],
            "install": f'pip install "sfumato[{name}]"',
        }
        for name, libraries in sorted(wanted.items())
    }


def places() -> Facts:
    """Where the box, the adapters and what is remembered lie."""
    from sfumato.pipeline import box_path
    from sfumato.weights.shelf import USUAL, VARIABLE, Shelf, usual_folders

    box = box_path()
    facts: Facts = {"box": str(box), "box MB": round(box.stat().st_size / 1e6, 1) if box.is_file() else None}
    folders = usual_folders()
    facts["adapters"] = [str(folder) for folder in folders]
    facts["adapters from"] = f"${VARIABLE}" if VARIABLE in os.environ else f"{' and '.join(USUAL)} of this folder"
    there = [folder for folder in folders if folder.is_dir()]
    facts["adapters there"] = {
        kind: len(Shelf(there).files(kind)) for kind in ("lora", "embedding", "hypernet", "control")
    }
    facts["adapters missing"] = [str(folder) for folder in folders if not folder.is_dir()]
    facts["outputs"] = str(Path("outputs").resolve())
    return facts


def fits(device: str) -> dict[str, str]:
    """How one picture of each large family would be drawn in what is free now, or that it does not fit."""
    import torch

    from sfumato.families import find_family
    from sfumato.memory import budget, describe, plan

    found = {}
    where = torch.device(device)
    for name in ("sd1", "sd2", "xl"):
        family = find_family(name)
        try:
            free = budget(None, where)
            found[name] = describe(plan(family, family.size, family.size, 1, free, where))
        except ValueError as error:
            found[name] = f"does not fit: {error}"
    return found


def self_test(device: str, precision: str) -> Facts:
    """Draw one picture with the box and compare it with the expected one; `problem` says what is wrong, if anything."""
    from sfumato.pipeline import Pipeline, box_path

    began = time.perf_counter()
    if not box_path().is_file():
        return {"problem": f"the box is missing: {box_path()}; install the package again"}
    pipeline = Pipeline.from_pretrained(device=device, precision=precision, adapters=[])
    facts: Facts = {"loading seconds": round(time.perf_counter() - began, 2)}
    if pipeline.model.hash != TEST_MODEL:
        return facts | {"problem": f"the box has hash {pipeline.model.hash}, not {TEST_MODEL}: the file is damaged"}
    try:
        result = pipeline(progress=_deadline(began + TEST_SECONDS), **TEST)
    except TimeoutError as error:
        return facts | {"problem": str(error)}
    facts["drawing seconds"] = round(result.seconds, 2)
    return facts | compared(result.images[0], pipeline.model.precision)


def compared(image: Any, precision: str) -> Facts:
    """How far a test picture (128, 128, 3) uint8 is from the expected one, in `precision` such as "float32"."""
    import numpy as np

    means = np.asarray(image, np.float64).reshape(4, 32, 4, 32, 3).mean((1, 3))
    seen = means.round(1).reshape(16, 3).tolist()
    difference = float(np.abs(means.reshape(16, 3) - np.asarray(EXPECTED, np.float64)).max())
    facts: Facts = {"difference": round(difference, 2), "allowed": NEAR[precision], "seen": seen}
    if not difference <= NEAR[precision]:
        facts["problem"] = (
            f"the picture is {difference:.1f} of 255 from the expected one, {NEAR[precision]:g} is allowed"
        )
    return facts


def _deadline(until: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if time.perf_counter() > until:
            raise TimeoutError(
                f"stopped after {TEST_SECONDS:g} s at step {done} of {total}: this machine is slow or busy"
            )

    return progress


def advice(report: Mapping[str, Any]) -> list[str]:
    """What could be better, a line each."""
    chosen, about, found = report["choice"], report["machine"], []
    if chosen["device"] == "cpu" and _is_cpu_build() and shutil.which("nvidia-smi"):
        found.append("there seems to be an NVIDIA card, but this torch is built for the CPU: install torch with CUDA")
    usable = about["usable cores"]
    if usable and chosen["threads"] > usable:
        found.append(f"{chosen['threads']} threads share {usable} cores: OMP_NUM_THREADS={usable} is faster")
    if usable and chosen["device"] == "cpu" and chosen["threads"] < usable:
        found.append(f"{chosen['threads']} of {usable} cores are used: OMP_NUM_THREADS={usable} uses all")
    found += [f"adapters: {folder} is no folder" for folder in report["places"]["adapters missing"]]
    if about["free disk GiB"] * GIB < ENOUGH_FREE:
        found.append(f"{about['free disk GiB']} GiB are free on the disk: pictures may soon find no room")
    for name, line in report["fits"].items():
        if line.startswith("does not fit"):
            found.append(f"{name} does not fit into what is free; a GPU, or closing other programs, would help")
    return found


def told(report: Mapping[str, Any]) -> list[str]:
    """The report as lines for people."""
    lines: list[str] = []

    def part(title: str, rows: Sequence[tuple[str, object]]) -> None:
        lines.append(title)
        lines.extend(f"  {name:<14} {value}" for name, value in rows)

    part("versions", [*report["versions"].items()])
    rows = [(name, value) for name, value in report["machine"].items() if name != "devices" and value is not None]
    for device in report["machine"].get("devices", ()):
        rows.append((device["name"], device["kind"] + (f", {device['GiB']} GiB" if device["GiB"] else "")))
    part("machine", rows)
    if chosen := report.get("choice"):
        names = (("device", "this device"), ("precision", "this precision"), ("threads", "so many threads"))
        part("would be chosen", [(name, f"{chosen[name]} ({chosen[f'why {why}']})") for name, why in names])
        here = report["places"]
        kinds = ", ".join(f"{number} {kind}" for kind, number in here["adapters there"].items())
        folders = " ".join(here["adapters"]) or "no folder"
        part("places", [("box", f"{here['box']} ({here['box MB']} MB)"), ("outputs", here["outputs"]),
                        ("adapters", f"{folders}, from {here['adapters from']}: {kinds}")])  # fmt: skip
        part("one picture of", list(report["fits"].items()))
    part("extras", [(name, _extra_line(facts)) for name, facts in report["extras"].items()])
    if test := report.get("self-test"):
        part("self-test", [(name, value) for name, value in test.items() if name not in ("seen", "problem")])
    part("problems", [("", line) for line in report["problems"]] or [("", "none")])
    part("advice", [("", line) for line in report["advice"]] or [("", "none")])
    return [line.rstrip() for line in lines]


def _extra_line(facts: Mapping[str, Any]) -> str:
    there = ", ".join(f"{name} {version}" for name, version in facts["there"].items())
    if not facts["missing"]:
        return there
    return "; ".join(part for part in (there, f"without {', '.join(facts['missing'])}: {facts['install']}") if part)
