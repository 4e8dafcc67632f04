"""Which task a job is: the only list of tasks. A new one is a function of (job, studio), and a line here."""

from __future__ import annotations

from sfumato.tasks.outpaint import outpaint
from sfumato.tasks.picture_checks import SIDES
from sfumato.tasks.redraw import redraw
from sfumato.tasks.scenes import Task
from sfumato.tasks.studio import Studio
from sfumato.tasks.txt2img import txt2img
from sfumato.tasks.upscale import upscale
from sfumato.types import Job


def task_of(job: Job, studio: Studio) -> Task:
    """The task of a complete job, not yet begun."""
    if job.image is None:
        return txt2img(job, studio)
    if job.upscale is not None:
        return upscale(job, studio)
    if any(getattr(job, side) for side in SIDES):
        return outpaint(job, studio)
    return redraw(job, studio)
