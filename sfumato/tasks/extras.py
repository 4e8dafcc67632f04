"""What a job names beside its model: LoRAs, hypernetworks and embeddings in its prompts, and what steers it.

Everything is loaded once, found by name on a shelf. Owns which adapters are on the model's networks.
Letters: H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.families import Model
from sfumato.images.annotate import annotate, find_annotator
from sfumato.images.fitting import fitted
from sfumato.models.hed import HED
from sfumato.models.hypernetwork import worn
from sfumato.prompts.networks import Hypernet, Lora, Network
from sfumato.tasks.pictures import Pictures
from sfumato.tasks.steering import Adding, Prompting, steering_of, weights_of
from sfumato.types import Control, Garment, Job, Steer
from sfumato.weights.adapters.adapter import Adapter
from sfumato.weights.adapters.reading import load_adapter
from sfumato.weights.adapters.wearing import Wardrobe, Worn
from sfumato.weights.controls.hed import load_hed, soft_edges
from sfumato.weights.controls.steering import load_steering
from sfumato.weights.embeddings import Embedding, find_embeddings
from sfumato.weights.files import sha256
from sfumato.weights.hypernetworks import HypernetworkFile, load_hypernetwork
from sfumato.weights.shelf import Shelf
from sfumato.weights.towers import ImageTower, load_tower

log = logging.getLogger(__name__)

UNKNOWN = object()  # on the networks, after an error


@dataclass(frozen=True)
class What:
    """One adapter as it is worn: its kind ("lora" or "hypernet"), its file, its strengths."""

    kind: str
    path: Path
    text: float = 1.0
    unet: float = 1.0
    dyn: int | None = None


class Extras:
    """The adapters, embeddings and control networks of one model. Not for several threads at once.

    `pictures` are those that jobs' controls may name.
    """

    def __init__(self, model: Model, shelf: Shelf | None = None) -> None:
        self.model = model
        self.shelf = Shelf() if shelf is None else shelf
        self.pictures = Pictures()
        self._adapters: dict[Path, Adapter] = {}
        self._hypernets: dict[Path, HypernetworkFile] = {}
        self._controls: dict[Path, Adding | Prompting] = {}
        self._towers: dict[Path, ImageTower] = {}
        self._embeddings: dict[str, Embedding] | None = None
        self._edges: HED | None = None
        self._wardrobe = Wardrobe(model)
        self._on: tuple[Hashable, ...] = ()
        self._hypernets_on = ExitStack()

    @property
    @torch.inference_mode(False)
    def embeddings(self) -> dict[str, Embedding]:
        """Every embedding on the shelf that fits the model, by name; those that do not are told once."""
        if self._embeddings is None:
            self._embeddings = {}
            for folder in sorted({path.parent for path in self.shelf.files("embedding").values()}):
                found, skipped = find_embeddings(folder, self.model)
                self._embeddings |= found
                for name, why in skipped.items():
                    log.info("embedding %s is left out: %s", name, why)
        return self._embeddings

    @torch.inference_mode(False)  # what is loaded outlives the drawing that first asks for it
    def garments(self, networks: Sequence[Network]) -> tuple[Garment, ...]:
        """What a prompt's tags ask for, loaded. ValueError for a name that is nowhere, or a file that does not fit."""
        found = []
        for network in networks:
            if isinstance(network, Lora):
                path = self.shelf.find("lora", network.name)
                if path not in self._adapters:
                    self._adapters[path] = load_adapter(path, self.model)
                    log.info("%s", self._adapters[path].describe())
                start, end = _window(network.rest, network.name)
                found.append(Garment(What("lora", path, network.text, network.unet, network.dyn), start, end))
            elif isinstance(network, Hypernet):
                path = self.shelf.find("hypernet", network.name)
                if path not in self._hypernets:
                    file = load_hypernetwork(path)
                    file.network.to(self.model.device, self.model.dtype)
                    self._hypernets[path] = file
                start, end = _window(network.rest, network.name)
                found.append(Garment(What("hypernet", path, unet=network.strength), start, end))
            else:
                raise ValueError(f"prompt: <{network.kind}:...> is no kind of network that is known: lora, hypernet")
        return tuple(found)

    def wear(self, whats: tuple[Hashable, ...]) -> None:
        """Put exactly these (of `garments`) on the model's networks; () gives every bit back."""
        if whats == self._on:
            return
        self._on = (UNKNOWN,)  # until all is done: an error half way must not pass for what was on before
        known = [what for what in whats if isinstance(what, What)]
        loras = [w for w in known if w.kind == "lora"]
        self._wardrobe.wear([Worn(self._adapters[w.path], w.text, w.unet, w.dyn) for w in loras])
        self._hypernets_on.close()
        nets = [(self._hypernets[w.path].network, w.unet) for w in known if w.kind == "hypernet"]
        self._hypernets_on.enter_context(worn(self.model.unet, nets))
        self._on = whats

    def steered(self, job: Job) -> tuple[tuple[Steer, ...], tuple[Steer, ...]]:
        """What steers the prompt's rows of a complete job, and those of its negative prompt."""
        positive: list[Steer] = []
        negative: list[Steer] = []
        for number, control in enumerate(job.controls):
            name = f"controls[{number}].image"
            pixels = self.pictures.picture(control.image or str(job.image), name).pixels
            for found, rows in zip(self._steers(control, pixels, job), (positive, negative), strict=True):
                if found is not None:
                    rows.append(found)
        return tuple(positive), tuple(negative)

    def _steers(self, control: Control, pixels: np.ndarray, job: Job) -> tuple[Steer | None, Steer | None]:
        """What a control does to the prompt's rows, and to the negative prompt's."""
        network = self.control(control)
        window = {"start": control.start, "end": control.end}
        if isinstance(network, Prompting):
            tokens, none = network.tokens(pixels, self.tower(control))
            return Steer(network, tokens, control.weight, **window), Steer(network, none, control.weight, **window)
        made = self.pictures.hints.get(_hint_name(control, job))
        hint = self.hint(control, pixels, int(job.width or 0), int(job.height or 0)) if made is None else made
        hint = hint.to(self.model.device, self.model.dtype)
        steer = Steer(network, hint, weights_of(control, network.count(hint)), **window)
        return steer, steer if control.mode in ("balanced", "prompt") else None

    def unmade(self, job: Job) -> dict[Hashable, Callable[[], Tensor]]:
        """What makes each hint of a complete job that a network finds, by its name among `pictures.hints`.

        Without those that are there. They may be made in another thread: nothing is changed that draws.
        """
        found: dict[Hashable, Callable[[], Tensor]] = {}
        for number, control in enumerate(job.controls):
            name = _hint_name(control, job)
            if control.annotate is None or name in self.pictures.hints or isinstance(self.control(control), Prompting):
                continue
            if find_annotator(control.annotate).network is not None:
                pixels = self.pictures.picture(control.image or str(job.image), f"controls[{number}].image").pixels
                found[name] = partial(self.hint, control, pixels, int(job.width or 0), int(job.height or 0))
        return found

    def tower(self, control: Control) -> ImageTower:
        """The image encoder that an IP-Adapter was made with: the one that its control names, else the only one."""
        if control.annotate is not None:
            path = self.shelf.find("vision", control.annotate)
        else:
            there = self.shelf.files("vision")
            if len(there) != 1:
                known = f"one of {', '.join(there)}" if there else "CLIP's image tower, in a folder clip_vision"
                raise ValueError(
                    f"controls.annotate=None: {control.model!r} needs to be told its image encoder: {known}"
                )
            (path,) = there.values()
        if path not in self._towers:
            with torch.inference_mode(False):
                tower = load_tower(path)
                self._towers[path] = tower.to(self.model.device, self.model.dtype).requires_grad_(False)
        return self._towers[path]

    def hint(self, control: Control, pixels: np.ndarray, width: int, height: int) -> Tensor:
        """The hint (1, 3, H, W) in [0, 1] that a control makes of a picture (H', W', 3) uint8."""
        pixels = fitted(pixels, width, height, control.resize)
        if control.annotate is not None:
            pixels = annotate(pixels, control.annotate, self._finder(control.annotate), **control.options)
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255

    @torch.inference_mode(False)
    def _finder(self, annotator: str) -> Callable[[np.ndarray], np.ndarray] | None:
        """The network that an annotator needs; None for most, and where it must be given as a picture instead."""
        if find_annotator(annotator).network != "edges":
            return None
        if self._edges is None:
            self._edges = load_hed(device=self.model.device)
        return partial(soft_edges, self._edges)

    @torch.inference_mode(False)
    def control(self, control: Control) -> Adding | Prompting:
        """The network of a control, on the model's device and in its precision."""
        path = self.shelf.find("control", control.model)
        if path not in self._controls:
            on = self._on
            self.wear(())  # a file of differences is added to the U-Net as it is without adapters
            self._controls[path] = steering_of(load_steering(path, self.model))
            self.wear(on)
        return self._controls[path]

    def hashes(self, networks: Sequence[Network], controls: Sequence[Control]) -> dict[str, str]:
        """SHA-256 of each file that is named, by kind and name, for a picture's recipe."""
        named = [("lora", n.name) for n in networks if isinstance(n, Lora)]
        named += [("hypernet", n.name) for n in networks if isinstance(n, Hypernet)]
        named += [("control", control.model) for control in controls]
        found = {}
        for kind, name in named:
            path = self.shelf.find(kind, name)
            if path.is_file():
                found[f"{kind}:{name}"] = sha256(path)
        return found


def _hint_name(control: Control, job: Job) -> Hashable:
    """What a control's hint for a complete job is known by: all that it is made of."""
    options = tuple(sorted(control.options.items()))
    return control.image or job.image, control.annotate, options, control.resize, job.width, job.height


def _window(rest: Sequence[str], name: str) -> tuple[float, float]:
    """The steps of a tag, `start=` and `end=` as fractions; what else is in it is told."""
    window = {"start": 0.0, "end": 1.0}
    for part in rest:
        key, _, value = part.partition("=")
        try:
            if key not in window or not 0 <= float(value) <= 1:
                raise ValueError
            window[key] = float(value)
        except ValueError:
            log.warning("prompt: %r in the tag of %r means nothing here", part, name)
    if window["start"] >= window["end"]:
        raise ValueError(f"prompt: {name!r} from {window['start']} to {window['end']} of the steps: start before end")
    return window["start"], window["end"]
