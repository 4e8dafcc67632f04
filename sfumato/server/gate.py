"""The gate that every request goes through: who may come from where, how much may be sent, and what is logged.

Knows no route.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import time
import uuid
from collections.abc import Collection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import HTTPException, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.server.logs import request_id
from sfumato.server.metrics import Metrics

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_BODY = 48 * 1024 * 1024  # bytes


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _address(text: str) -> SplitResult:
    """An address in its parts; of what is none, all parts are empty."""
    try:
        return urlsplit(text)
    except ValueError:
        return SplitResult("", "", "", "", "")


def problem(status: int, message: str, field: str | None = None, headers: dict[str, str] | None = None) -> Response:
    """The answer to whatever goes wrong. ASCII only, so that any text can be said."""
    return _json(status, {"error": {"field": field, "message": message}}, headers)


def foreign_problem(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """The same as A1111 answers it."""
    return _json(status, {"error": "HTTPException", "detail": message, "body": "", "errors": message}, headers)


def _json(status: int, content: dict[str, Any], headers: dict[str, str] | None) -> Response:
    said = json.dumps(content)
    return Response(said, status, headers, media_type="application/json")


class Gate:
    """An ASGI application around another.

    Browsers' pages of other origins get nothing. `hosts` are the names under which the server may be called (None:
    any): a server without keys must not be reached through a stranger's name that points to this machine.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: Collection[str] | None, max_body: int = MAX_BODY) -> None:
        self.app, self.metrics, self.hosts, self.max_body = app, metrics, hosts, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(id)
        began, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            refusal = self._refusal(headers)
            if refusal is not None:
                await refusal(scope, receive, answer)
            else:
                await self.app(scope, self._bounded(receive), answer)
        finally:
            self._note(scope, status, time.perf_counter() - began)
            request_id.reset(token)

    def _refusal(self, headers: dict[bytes, str]) -> Response | None:
        host = headers.get(b"host", "")
        if self.hosts is not None and _address(f"//{host}").hostname not in self.hosts:
            return problem(403, f"host={host[:80]!r}: this server is not called so")
        origin = headers.get(b"origin")
        if origin is not None and _address(origin).netloc != host:
            return problem(403, f"origin={origin[:80]!r}: pages of other sites may not ask")
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length[:12]) > self.max_body or len(length) > 12:
            return self._too_much()
        return None

    def _too_much(self) -> Response:
        return problem(413, f"body: more than {self.max_body} bytes", headers={"connection": "close"})

    def _bounded(self, receive: Receive) -> Receive:
        """The same, but for bodies that go on beyond what is allowed without having said so."""
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body:
                raise HTTPException(413, f"body: more than {self.max_body} bytes", {"connection": "close"})
            return message

        return bounded

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.requests.labels(scope["method"], route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        said = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4)}
        quiet = route in ("/healthz", "/readyz", "/metrics")
        log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": said})
