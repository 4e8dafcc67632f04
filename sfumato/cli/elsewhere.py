"""Flags and jobs that hold in any folder: relative paths made absolute, before they go to processes elsewhere.

A process on a cluster begins in a folder of its own. What is no path of something here, such as a hub id or the name of
a network, stays as it is, and so does what is missing, for the error to name it as it was given.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.prompts.networks import TAG
from sfumato.safety.opennsfw import OpenNsfw
from sfumato.types import Control, Job
from sfumato.weights.shelf import SUFFIXES, usual_folders

FILES = ("ckpt", "vae", "safety_checker", "sign", "styles", "wildcards")  # flags that may name a file or a folder
LISTS = ("adapters", "refuse_words")
SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!file:|:memory:)([^/?][^?]*)(\?.*)?")


def absolute_flags(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of a command as they hold in any folder: files, folders, the usual ones of adapters, a SQLite queue."""
    here = Path.cwd()
    found = dict(vars(args))
    for name, value in found.items():
        if isinstance(value, Path):
            found[name] = here / value
        elif name in FILES and isinstance(value, str) and (name, value) != ("safety_checker", OpenNsfw.name):
            found[name] = absolute(value, here)
        elif name in LISTS and value is not None:
            found[name] = [absolute(each, here) for each in value]
    if "adapters" in found and found["adapters"] is None:
        found["adapters"] = [str(here / folder) for folder in usual_folders()]
    database = SQLITE.fullmatch(found.get("database") or "")
    if database is not None:
        found["database"] = f"{database[1]}{here / database[2]}{database[3] or ''}"
    return argparse.Namespace(**found)


def absolute(text: str, folder: Path) -> str:
    """A path that is there, seen from `folder`, as an absolute one; any other text as it is."""
    path = folder / Path(text).expanduser()
    return str(path) if text and path.exists() else text


@dataclass(frozen=True)
class Anchored:
    """What is done to a job's texts, and then: the files that it names by absolute paths, as seen from `folder`."""

    folder: Path
    texts: Callable[[Job], Sequence[Job]]

    def __call__(self, job: Job) -> list[Job]:
        """The jobs that the texts make of a job."""
        return [absolute_job(each, self.folder) for each in self.texts(job)]


def absolute_job(job: Job, folder: Path) -> Job:
    """The job with the pictures and networks that it names, in its prompts too, as they hold in any folder."""
    from sfumato.images import UPSCALERS

    files: dict[str, Any] = {name: getattr(job, name) for name in ("image", "mask", "depth")}
    if job.upscaler not in UPSCALERS:
        files["upscaler"] = job.upscaler
    files = {name: absolute(path, folder) for name, path in files.items() if isinstance(path, str)}
    hires = job.hires
    if hires is not None:
        texts = {"prompt": hires.prompt, "negative": hires.negative}
        said: dict[str, Any] = {name: _tags(text, folder) for name, text in texts.items() if text is not None}
        hires = replace(hires, **said)
    prompt, negative = _tags(job.prompt, folder), _tags(job.negative, folder)
    controls = tuple(_control(control, folder) for control in job.controls)
    return replace(job, **files, prompt=prompt, negative=negative, hires=hires, controls=controls)


def _control(control: Control, folder: Path) -> Control:
    image = None if control.image is None else absolute(control.image, folder)
    annotate = control.annotate
    if annotate is not None and annotate != Path(annotate).name:  # else an annotator's, whatever lies here
        annotate = _network(annotate, folder)
    return replace(control, model=_network(control.model, folder), image=image, annotate=annotate)


def _network(name: str, folder: Path) -> str:
    """A network's path where a shelf takes the name for one, which it does before it looks among its own."""
    path = folder / name
    return str(path) if name and path.exists() and (path.suffix in SUFFIXES or path.is_dir()) else name


def _tags(text: str, folder: Path) -> str:
    """A prompt whose tags name networks' files."""

    def moved(tag: re.Match[str]) -> str:
        name, colon, rest = tag[2].partition(":")
        path = _network(name.strip(), folder)
        if tag[1] not in ("lora", "lyco", "hypernet") or path == name.strip() or set(path) & set("<>:"):
            return tag[0]
        return f"<{tag[1]}:{path}{colon}{rest}>"

    end = text.rfind(">") + 1
    return TAG.sub(moved, text[:end]) + text[end:]
