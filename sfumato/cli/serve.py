"""Serve pictures over HTTP to many users at once, from a queue that survives whatever ends the program."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.cli.loading import add_device_flags, add_model_flags, load
from sfumato.cli.protecting import Protecting, add_protecting_flags
from sfumato.safety.checking import Checked, prompts_of
from sfumato.types import Job, Result

INSTALL = 'pip install "sfumato[serve]"'
INSTALL_PAGE = 'pip install "sfumato[page]"'
DATA = "sfumato-data"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sfumato serve`, and of what is beside it: keys, pause, resume."""
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="where to listen; others than this machine need a key (default: %(default)s)",
    )
    add("--port", type=int, default=7861, help="0: any that is free (default: %(default)s)")
    add("--data", type=Path, default=Path(DATA), metavar="DIR", help="queue, results and keys (default: %(default)s)")
    add("--database", metavar="URL", help="a queue that several servers share, such as postgresql+psycopg://...")
    add("--max-rows", type=int, metavar="N", help="rows of a network call at most (default: by the memory, 32 at most)")
    add("--deterministic", action="store_true", help="draw every job alone: pictures to the last bit, in more time")
    add(
        "--grace", type=float, default=10.0, metavar="S", help="s for what is at work at the end (default: %(default)s)"
    )
    add("--keep", type=float, default=30.0, metavar="DAYS", help="days that results are kept (default: %(default)s)")
    add("--ray", action="store_true", help="serve with replicas on a Ray cluster: that of $RAY_ADDRESS (auto: one that "
        "runs on this machine), else one started here")  # fmt: skip
    add("--replicas", metavar="N", help="engines of --ray: a number, or a range such as 1-4 by the queue (default: 1)")
    add("--no-page", dest="page", action="store_false", help="only the APIs, no web page")
    add_model_flags(parser)
    add_device_flags(parser)
    add_protecting_flags(parser)
    beside = parser.add_subparsers(title="beside", metavar="keys | pause | resume", dest="beside")
    keys = beside.add_parser("keys", help="who may draw: add NAME, remove NAME, list")
    keys.add_argument("act", choices=["add", "remove", "list"])
    keys.add_argument("who", nargs="?", metavar="NAME")
    for name, help in (
        ("requests", "requests a minute"), ("pixels", "pixels of a job"), ("steps", "steps of a job"),
        ("count", "pictures of a job"), ("waiting", "jobs that are not done"),
    ):  # fmt: skip
        keys.add_argument(f"--{name}", type=int, metavar="N", help=f"{help} that the key allows")
    for sub in (keys, beside.add_parser("pause", help="begin nothing more"), beside.add_parser("resume", help="go on")):
        # only where it is said here, so that what was said before `keys` stays
        sub.add_argument("--data", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="as of serve")
        sub.add_argument("--database", default=argparse.SUPPRESS, metavar="URL", help="as of serve")


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; or look after keys and the queue."""
    try:
        import fastapi  # noqa: F401 - whether they are there
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import sqlalchemy  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serve: {error.name} is not installed ({INSTALL})") from error
    if args.beside == "keys":
        return _keys(args)
    if args.beside in ("pause", "resume"):
        return _pause(args)
    return _serve(args)


def _keys(args: argparse.Namespace) -> int:
    from sfumato.server.keys import Keys

    keys = Keys(args.data / "keys.json")
    if args.act == "list":
        print("\n".join(keys.names()))
        return 0
    if args.who is None:
        raise ValueError(f"keys {args.act}: whose? A name is needed")
    if args.act == "remove":
        keys.remove(args.who)
        return 0
    limits = {name: getattr(args, name) for name in ("requests", "pixels", "steps", "count", "waiting")}
    print(keys.add(args.who, **limits))
    print("this is the only time that the key is shown", file=sys.stderr)
    return 0


def _pause(args: argparse.Namespace) -> int:
    from sfumato.server.queue import Queue

    if args.database is None and not (args.data / "queue.db").is_file():
        raise ValueError(f"data={str(args.data)!r}: there is no queue")
    queue = Queue(args.database or f"sqlite:///{args.data / 'queue.db'}")
    queue.pause(args.beside == "pause")
    queue.close()
    return 0


class Guard:
    """What --safety, --refuse-words, --watermark and --sign ask for, as the server wants it (server/protecting.py)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.own = Protecting(args)

    @property
    def hides(self) -> bool:
        """Whether flagged pictures are not shown as they were drawn."""
        return self.own.policy in ("blur", "withhold")

    def check_order(self, job: Job, width: int, height: int) -> None:
        """ValueError where a complete job's prompts are refused, or its pictures have no room for the mark."""
        self.own.check_prompts(prompts_of(job))
        self.own.check_size(height, width)

    def protected(self, result: Result, alive: Callable[[], None]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Each picture (H, W, 3) uint8 looked at, marked and signed, with its recipe."""
        found = []
        for image in result.images:
            found.append(self.own.shown(replace(result, images=image[None])))
            alive()
        images = np.concatenate([each.result.images for each in found])
        verdicts = tuple(verdict for each in found for verdict in each.verdicts)
        whole = Checked(replace(result, images=images), verdicts, self.own.policy)
        for index in range(len(images)):
            yield self.own.finished(whole, index)


def _serve(args: argparse.Namespace) -> int:
    import uvicorn

    from sfumato.server.app import check_bind
    from sfumato.server.keys import Keys

    check_bind(args.host, Keys(args.data / "keys.json"))
    if args.max_rows is not None and args.max_rows < 1:
        raise ValueError(f"max-rows={args.max_rows}: 1 or more are needed")
    if args.ray:
        return _serve_on_ray(args)
    if args.replicas is not None:
        raise ValueError(f"replicas={args.replicas}: they are of --ray")
    uvicorn.run(
        application_of(args), host=args.host, port=args.port, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=5, timeout_keep_alive=30, limit_concurrency=1000,
    )  # fmt: skip
    return 0


def _serve_on_ray(args: argparse.Namespace) -> int:
    from sfumato.cli.elsewhere import absolute_flags
    from sfumato.server import cluster

    scale = cluster.read_scale(args.replicas or "1")
    cluster.check_database(args.database)
    args = absolute_flags(args)  # replicas begin in folders of their own
    args.page = False  # its sessions live in one process
    cluster.run(partial(application_of, args), scale, args.host, args.port, args.device, args.grace)
    return 0


def application_of(args: argparse.Namespace) -> Any:
    """The FastAPI application that the flags ask for, with its desk open. Called in the process that draws."""
    from sfumato.server import a1111, controlnet, openai
    from sfumato.server.app import create_app
    from sfumato.server.desk import Desk, Settings
    from sfumato.server.gate import is_loopback
    from sfumato.server.logs import set_up_logs

    protecting = Guard(args)
    set_up_logs()
    pipeline = load(args, args.device, args.precision)
    if args.max_rows is not None:
        pipeline.engine.max_rows = args.max_rows
    settings = Settings(args.data, args.database, args.deterministic, args.max_rows, keep=args.keep * 24 * 3600)
    desk = Desk(pipeline, settings, protecting)
    doors = [a1111.router, controlnet.router, openai.router]
    app = create_app(desk, routers=doors, only_local=is_loopback(args.host), grace=args.grace)
    if args.page:
        _add_page(app, desk)
    return app


def _add_page(app: Any, desk: Any) -> None:
    """The web page, where what it needs is installed."""
    if find_spec("gradio") is None:
        logging.getLogger(__name__).warning("there is no web page: gradio is not installed (%s)", INSTALL_PAGE)
        return
    os.environ.setdefault("GRADIO_TEMP_DIR", str(desk.settings.data.absolute() / "page"))  # not where all can look
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from sfumato.server.page.mounting import mount

    mount(app, desk)
