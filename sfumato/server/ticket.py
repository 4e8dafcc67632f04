"""A ticket: what whoever hands a job to the service holds of it - its state, progress, previews and result.

Knows neither the service nor HTTP. Letters: H W pixels.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sfumato.images import resize
from sfumato.tasks.previews import Preview
from sfumato.tasks.scenes import Scene, size_of
from sfumato.types import Job, Result

log = logging.getLogger(__name__)

WAITING, RUNNING, DONE, FAILED, CANCELLED = STATES = ("waiting", "running", "done", "failed", "cancelled")
OVER = (DONE, FAILED, CANCELLED)


class Cancelled(Exception):
    """The job was cancelled before it was done."""


class Ticket:
    """One complete job in the service's hands. `done` of `total` steps are behind it, of all its pictures.

    `listener` is called with the ticket, in the service's thread, whenever a step is done and when the state changes;
    it must be quick. In the end `state` is one of OVER and there is a `result`, an `error`, or neither.
    """

    def __init__(self, job: Job, user: str, listener: Callable[[Ticket], None] | None, preview: Preview | None) -> None:
        self.job, self.user = job, user
        self.state = WAITING
        self.done = self.total = 0
        self.result: Result | None = None
        self.error: Exception | None = None
        self.cancelling = False
        self._listener, self._preview = listener, preview
        self._seen: tuple[Tensor, Scene] | None = None
        self._over = threading.Event()

    def wait(self, seconds: float | None = None) -> Result:
        """The result, once it is there. Raises the job's error, Cancelled, or TimeoutError after so many seconds."""
        if not self._over.wait(seconds):
            raise TimeoutError(f"the job is still {self.state} after {seconds} s")
        if self.result is None:
            raise self.error or Cancelled("the job was cancelled")
        return self.result

    @torch.inference_mode()
    def preview(self) -> np.ndarray | None:
        """What the picture last worked on is believed to be, (H, W, 3) uint8; None where nothing is known yet."""
        seen = self._seen
        if seen is None or self._preview is None:
            return None
        x0, scene = seen
        height, width = size_of(scene.job)
        return scene.finished(resize(self._preview(x0), width, height, "bicubic"))[0]

    def see(self, x0: Tensor, scene: Scene) -> None:
        """Keep what a picture, x0 (1, C, h, w) of a scene, is believed to be."""
        self._seen = x0, scene

    def tell(self, done: int, total: int) -> None:
        """So many steps are behind it."""
        self.done, self.total = done, total
        self._say()

    def become(self, state: str, result: Result | None = None, error: Exception | None = None) -> None:
        """Change the state; the first of OVER is final."""
        if self.state in OVER:
            return
        self.state, self.result, self.error = state, result, error
        if state in OVER:
            self._seen = None
            self._over.set()
        self._say()

    def _say(self) -> None:
        if self._listener is None:
            return
        try:
            self._listener(self)
        except Exception:  # a listener's slip must not end the jobs of others
            log.exception("a listener failed")
