"""How the page looks: its colours, its keys, its lines of text. HTML, CSS and JavaScript; nothing from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from sfumato.server.protecting import Told

FONTS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
SHOWN = {"report": "flagged", "blur": "flagged, blurred", "withhold": "flagged, withheld"}
MONO = ("ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace")

CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; padding: 0 16px !important; }
.gradio-container, .gradio-container main, .gradio-container .contain { width: 100% !important; }
.gradio-container main { padding: 8px 0 !important; }
#top { align-items: center; flex-wrap: nowrap; }
#top span { opacity: .6; margin-left: .6em; font-size: .9em; }
#top b { font-size: 1.25em; letter-spacing: .02em; }
#shade { max-width: 44px; }
#message, #about { min-height: 30px; padding: 0 !important; border-width: 0 !important; background: none; }
#message .said { font-size: .95em; line-height: 28px; min-height: 28px; overflow-wrap: anywhere; }
.said.quiet { opacity: .75; }
.said.wrong { color: #c62828; font-weight: 600; }
.dark .said.wrong { color: #ff8a80; }
.said progress { width: 60%; height: 10px; vertical-align: middle; margin-right: 1em; appearance: none; border: none; }
.said progress, .said progress::-webkit-progress-bar { background: #8883; border-radius: 5px; }
.said progress::-webkit-progress-value { background: #f97316; border-radius: 5px; }
.said progress::-moz-progress-bar { background: #f97316; border-radius: 5px; }
#preview img, #pictures .preview img, #pictures img { object-fit: contain; }
#preview img { width: 100%; height: 100%; }
#pictures .preview button img, #pictures .media-button img { width: 100%; height: 100%; }
#about dl { display: grid; grid-template-columns: max-content auto; gap: 2px 14px; font-size: .92em; margin: 6px 0; }
#about dt { opacity: .6; }
#about dd { overflow-wrap: anywhere; margin: 0; }
footer { display: none !important; }
"""

# Ctrl+Enter draws, Escape cancels.
KEYS = """() => {
  document.addEventListener('keydown', (event) => {
    const press = (id) => document.getElementById(id)?.click();
    if ((event.ctrlKey || event.metaKey) && event.key === 'Enter') { event.preventDefault(); press('draw'); }
    if (event.key === 'Escape') press('cancel');
  });
  const kept = localStorage.getItem('sfumato-shade');
  if (kept) document.body.classList.toggle('dark', kept === 'dark');
}"""

SHADE = """() => {
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('sfumato-shade', dark ? 'dark' : 'light');
}"""


def line(text: str, kind: str) -> str:
    """One line above the picture: `kind` is "quiet" or "wrong"."""
    return f'<div class="said {kind}" role="status">{html.escape(text)}</div>'


def progress(done: int, total: int) -> str:
    """How far a drawing is; before its first step it waits."""
    if not total:
        return line("waiting for its turn …", "quiet")
    bar = f'<progress value="{done}" max="{total}"></progress>'
    return f'<div class="said" role="status">{bar}step {done} of {total}</div>'


def verdict(told: Told) -> str:
    """What stands behind a picture's seed where it was flagged; "" where it was not."""
    if told.safety is None or not told.flagged:
        return ""
    return f" · {SHOWN.get(str(told.safety.get('policy')), 'flagged')}"


def recipe(job: Mapping[str, Any], told: Told) -> str:
    """What a picture was drawn with, and what was done with it then."""
    protected: dict[str, Any] = {"signed by": told.signed_by}
    if told.safety is not None:
        said = verdict(told).removeprefix(" · ") or "not flagged"
        protected["safety"] = f"{said}, by {told.safety.get('checker')}"
    if told.watermark is not None:
        protected["watermark"] = f"{told.watermark.get('text')} ({told.watermark.get('method')})"
    rows = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in {**job, **protected}.items()
        if value not in (None, "", [], {}) and name != "count"
    )
    return f"<dl>{rows}</dl>"
