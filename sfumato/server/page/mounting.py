"""The page under /page of the application, for whoever may draw: with a key where there are keys.

A browser asks for name and key by itself (HTTP Basic). Nothing is fetched from elsewhere, nothing is reported.
"""

from __future__ import annotations

import gradio as gr
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import RedirectResponse

from sfumato.server.app import whose_key
from sfumato.server.desk import Desk
from sfumato.server.keys import User
from sfumato.server.page import look
from sfumato.server.page.blocks import page_of

PATH = "/page"


def mount(app: FastAPI, desk: Desk) -> None:
    """Put the page into an application of create_app; "/" leads there."""

    def asks(request: Request) -> str:
        user = whose_key(desk, request.headers.get("authorization"))
        if user is None:
            raise HTTPException(401, "a name and its key are needed", {"WWW-Authenticate": 'Basic realm="Sfumato"'})
        return user.name

    def whose(request: gr.Request) -> User:
        user = whose_key(desk, request.headers.get("authorization"))
        if user is None:
            raise ValueError("key: one is needed; load the page again")
        return user

    app.add_api_route("/", lambda: RedirectResponse(PATH), include_in_schema=False)
    gr.mount_gradio_app(
        app, page_of(desk, whose), path=PATH, auth_dependency=asks, theme=_theme(), css=look.CSS, js=look.KEYS,
        ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, run_history=False, footer_links=[],
    )  # fmt: skip


def _theme() -> gr.themes.Base:
    """Gradio's own look with this machine's fonts, so that none is fetched."""
    return gr.themes.Default(
        primary_hue="orange", neutral_hue="stone", radius_size="md", font=look.FONTS, font_mono=look.MONO
    )
