"""What a command was asked to draw, job by job: one of several that is wrong, or fails, is told and fails alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from sfumato.types import Job

log = logging.getLogger(__name__)


class DrawingError(Exception):
    """A job was not drawn; its cause is why."""


@dataclass
class Asked:
    """The jobs of a prompt over a picture: one, or more where its texts hold choices; `line` is that of --from-file.

    What is wrong with one of several is its `error`, so that the others are drawn.
    """

    line: int | None = None
    jobs: list[Job] = field(default_factory=list)
    error: Exception | None = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keep the error of a line, for `sound`; without a file it is raised."""
        try:
            yield
        except (ValueError, OSError) as error:
            if self.line is None:
                raise
            self.error = error

    def name(self, job: Job) -> str:
        """Which of the jobs that were asked for it is, for people."""
        line = [] if self.line is None else [f"line {self.line}"]
        image = [] if job.image is None else [f"image={job.image!r}"]
        return ", ".join([*line, *image, f"seed={job.seed}"])


def sound(asked: Sequence[Asked]) -> list[Asked]:
    """Those that are well in themselves; of the others a line each. ValueError where none is well."""
    wrong = {(each.line, _line(each.error)): each.error for each in asked if each.error is not None}
    if all(each.error is not None for each in asked):
        reasons = {reason for _, reason in wrong}
        (line, reason), error = next(iter(wrong.items()))
        raise ValueError(reason if len(reasons) == 1 else f"line {line}: {reason}") from error
    for line, reason in wrong:
        log.warning("line %d is left out: %s", line, reason)
    return [each for each in asked if each.error is None]


def drawn_apart(asked: Sequence[Asked], draw: Callable[[Job], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """The pictures of all jobs. One of several that is not drawn is told in a line, and has its `error`.

    Where none could be drawn, the first error is raised.
    """
    several, any_drawn = sum(len(each.jobs) for each in asked) > 1, False
    for each in asked:
        for job in each.jobs:
            try:
                for image in draw(job):
                    any_drawn = True
                    yield image
            except DrawingError as failed:
                error = failed.__cause__
                assert isinstance(error, Exception)
                each.error = each.error or error
                if several:
                    surprise = None if is_told(error) else error
                    log.warning("%s is not drawn: %s", each.name(job), _line(error), exc_info=surprise)
    if not any_drawn:
        raise next(each.error for each in asked if each.error is not None)


def is_told(error: Exception) -> bool:
    """Whether an error is one that a person can mend, which a line says; any other is a fault, told with its trace."""
    from sfumato.engine import is_out_of_memory

    return isinstance(error, (ValueError, OSError)) or is_out_of_memory(error)


def _line(error: Exception) -> str:
    """An error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
