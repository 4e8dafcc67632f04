"""A checkpoint's name -> a path on this machine: a path is itself, "owner/name" is brought from the Hugging Face hub.

Owns which files of a repository are needed, and the one line that says why there are none. Reads no weights.
huggingface_hub is asked only where the name is no path; it is an extra: pip install "sfumato[hub]".
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".zip", ".tar", ".yaml", ".json", ".onnx"}
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
SINGLE_FILES = (".safetensors", ".ckpt")
CONFIG = re.compile(
    rf"model_index\.json|({'|'.join(NETWORKS)})/config\.json|scheduler/\w+\.json|tokenizer(_2)?/\w+\.(json|txt)"
)
# A network's weights, a shard of them, or the index of the shards: ("fp16" or None, "safetensors" or "bin").
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<a>[\w-]+?))?(?:-\d+-of-\d+)?(?:\.(?P<b>[\w-]+))?"
    r"\.(?P<kind>safetensors|bin)(?:\.index(?:\.(?P<c>[\w-]+))?\.json)?"
)


def resolve(
    path_or_id: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    *,
    field: str = "ckpt",
) -> Path:
    """The file or folder of a checkpoint: a path that exists, "owner/name", or "owner/name:file.safetensors".

    `revision` is a branch, tag or commit of the hub, `variant` names a folder's weight files ("fp16"), `token` is a
    hub token or True for the stored one. Without a network the hub's own cache serves. ValueError is one line, and
    begins with `field`.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    name = str(path_or_id)
    repo, _, file = name.partition(":")
    is_path = isinstance(path_or_id, Path) or not HUB_ID.fullmatch(repo) or repo[0] in "./"
    if is_path or (not file and path.suffix.lower() in SUFFIXES):
        raise ValueError(f"{field}={name!r}: no such file")
    hub = _hub(name, field)
    try:
        return _from_hub(hub, repo, file, revision, variant, token)
    except ValueError as error:
        raise ValueError(f"{field}={name!r}: {_first_line(error)}") from error


def needed(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of a repository's files those of a checkpoint in the diffusers layout; or its only single file.

    Safetensors where there are any, the asked variant or else the plain one or the only one. ValueError in words.
    """
    names = sorted(names)
    if "model_index.json" not in names:
        return _only_file(names)
    chosen = [name for name in names if CONFIG.fullmatch(name)]
    for network in NETWORKS:
        inside = [name for name in names if name.startswith(f"{network}/")]
        if inside:
            chosen += _weights(network, inside, variant)
    return chosen


def _only_file(names: list[str]) -> list[str]:
    files = [name for name in names if name.endswith(SINGLE_FILES) and "/" not in name]
    if len(files) != 1:
        shown = f"name one of its files, OWNER/NAME:FILE: {', '.join(files[:8])}" if files else "it holds no checkpoint"
        raise ValueError(f"it has no model_index.json; {shown}")
    return files


def _weights(network: str, inside: list[str], variant: str | None) -> list[str]:
    """A network's weight files, all shards and their index."""
    found: dict[tuple[str | None, str], list[str]] = {}
    for name in inside:
        if match := WEIGHTS.fullmatch(name.removeprefix(f"{network}/")):
            found.setdefault((match["a"] or match["b"] or match["c"], match["kind"]), []).append(name)
    variants = list(dict.fromkeys(key[0] for key in found))
    if variant is None and None not in variants and len(variants) == 1:
        (variant,) = variants
    for kind in ("safetensors", "bin"):
        if (variant, kind) in found:
            return found[variant, kind]
    there = ", ".join("the plain one" if each is None else each for each in variants)
    raise ValueError(f"variant={variant!r}: {network} has {there or 'no weights'}")


def _hub(name: str, field: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ValueError(
            f'{field}={name!r}: no such file; to ask the hub for it: pip install "sfumato[hub]"'
        ) from error
    return huggingface_hub


def _from_hub(
    hub: ModuleType, repo: str, file: str, revision: str | None, variant: str | None, token: str | bool | None
) -> Path:
    """One file of a repository, or all that is needed of it; from the cache where the hub does not give it."""
    asked = revision
    try:
        names = [file]
        if not file:
            told = hub.model_info(repo, revision=revision, token=token)
            names, revision = needed((each.rfilename for each in told.siblings or ()), variant), told.sha or revision
        if len(names) == 1:
            return Path(hub.hf_hub_download(repo, names[0], revision=revision, token=token))
        return Path(hub.snapshot_download(repo, revision=revision, token=token, allow_patterns=names))
    except Exception as error:  # of many kinds: HTTP, sockets, the hub's own; the cache may do without any of them
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise
        cached = _cached(hub, repo, file, asked, variant)
        if cached is None:
            raise ValueError(_in_words(hub, error, file, asked)) from error
        log.info("%s: taken from the cache; the hub: %s", repo, _first_line(error))
        return cached


def _cached(hub: ModuleType, repo: str, file: str, revision: str | None, variant: str | None) -> Path | None:
    """What the hub's cache has; None where it has nothing. ValueError where a folder in it lacks something."""
    kept = {"revision": revision, "local_files_only": True}
    try:
        if file:
            return Path(hub.hf_hub_download(repo, file, **kept))
        folder = Path(hub.snapshot_download(repo, allow_patterns=["model_index.json"], **kept))
    except OSError:
        return None
    try:
        names = needed((each.relative_to(folder).as_posix() for each in folder.rglob("*")), variant)
    except ValueError as error:
        raise ValueError(f"it is in the cache, but incomplete: {error}") from error
    return folder / names[0] if len(names) == 1 else folder


def _in_words(hub: ModuleType, error: Exception, file: str, revision: str | None) -> str:
    """Why the hub gave nothing, and what to do."""
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        return "its licence must be accepted on huggingface.co, and a token given (token=..., or: hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"revision={revision!r}: the hub has no such branch, tag or commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such file here and no such repository on the hub (a private one needs a token)"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"the repository has no file {file!r}"
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    why = "HF_HUB_OFFLINE is set" if isinstance(cause, errors.OfflineModeIsEnabled) else _first_line(cause)
    return f"not a path here, not in the cache, and the hub could not be reached ({why})"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
