"""The page itself: what lies where, and which function answers which click. Needs Gradio 6; owns no job."""

from __future__ import annotations

import html
import inspect
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import SCHEDULES
from sfumato.images import UPSCALERS
from sfumato.server.desk import Desk
from sfumato.server.hints import annotators
from sfumato.server.keys import User
from sfumato.server.page import look
from sfumato.server.page.form import FIELDS, OWN, flattened, form_of, job_of, with_lora, with_word
from sfumato.server.page.watching import Drawn, Sight, found, watched
from sfumato.server.queue import CANCELLED, DONE, OVER
from sfumato.tasks.picture_checks import FILLS
from sfumato.weights.upscalers import packaged_upscalers

Whose = Callable[[gr.Request], User]
Parts = dict[str, Any]
TABS = (
    ("text", "Words"),
    ("picture", "Picture"),
    ("inpaint", "Inpaint"),
    ("outpaint", "Outpaint"),
    ("upscale", "Upscale"),
)
TARGETS = {"picture": "picture", "inpaint": "drawn", "outpaint": "ground", "upscale": "small"}
FILLED = ("prompt", "negative", "width", "height", "steps", "sampler", "schedule", "guidance", "seed", "count", "hires",
          "hires_scale", "hires_strength", "more")  # fmt: skip


def page_of(desk: Desk, whose: Whose) -> gr.Blocks:
    """The page on a desk; `whose` says who asks, or raises ValueError."""
    with gr.Blocks(title="Sfumato", analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)) as blocks:
        model = desk.pipeline.model
        with gr.Row(elem_id="top"):
            gr.HTML(f"<b>Sfumato</b> <span>{html.escape(model.name)} · {html.escape(model.family.name)}</span>")
            shade = gr.Button("◐", elem_id="shade", size="sm", min_width=40, scale=0)
        with gr.Tabs(elem_id="pages") as pages:
            with gr.Tab("Draw", id="draw"), gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=340):
                    parts = _form(desk)
                with gr.Column(scale=3, min_width=340):
                    parts |= _easel()
            with gr.Tab("Results", id="results") as results:
                parts |= _results()
        parts["pages"] = pages
        shade.click(None, js=look.SHADE, api_visibility="private")
        _wire_drawing(parts, desk, whose)
        _wire_form(parts)
        _wire_results(parts, results, desk, whose)
    return blocks


def _form(desk: Desk) -> Parts:
    """The left side: words, what is drawn over, and all that folds out."""
    parts: Parts = {"mode": gr.State("text")}
    parts["prompt"] = gr.Textbox(
        label="Prompt", lines=3, autofocus=True, placeholder="a red apple on a blue background", elem_id="prompt"
    )
    parts["negative"] = gr.Textbox(label="Without", lines=1, placeholder="what is not to be seen", elem_id="negative")
    with gr.Row():
        parts["draw"] = gr.Button("Draw", variant="primary", elem_id="draw", scale=4)
        parts["cancel"] = gr.Button("Cancel", elem_id="cancel", interactive=False, scale=1, min_width=90)
    with gr.Tabs(elem_id="modes") as modes:
        for name, label in TABS:
            with gr.Tab(label, id=name) as tab:
                parts |= _MODES[name](desk)
            tab.select(partial(str, name), outputs=parts["mode"], api_visibility="private", show_progress="hidden")
    parts["modes"] = modes
    return parts | _advanced(desk) | _networks(desk) | _recipe()


def _words(desk: Desk) -> Parts:
    gr.Markdown("A picture from words alone. **Ctrl+Enter** draws.")
    return {}


def _picture(desk: Desk) -> Parts:
    return {
        "picture": gr.Image(label="Draw over this", type="filepath", image_mode=None, height=240, buttons=[]),
        "strength": gr.Slider(0, 1, 0.75, step=0.01, label="Strength: how much is drawn anew"),
    }


def _inpaint(desk: Desk) -> Parts:
    brush = gr.Brush(colors=["#ff6a00"], color_mode="fixed")
    return {
        "drawn": gr.ImageEditor(
            label="Brush over what is to be drawn anew", type="numpy", image_mode="RGBA", brush=brush, layers=False,
            transforms=(), height=380, elem_id="editor", buttons=[],
        ),
        "inpaint_strength": gr.Slider(0, 1, 1.0, step=0.01, label="Strength: how much is drawn anew"),
        "fill": gr.Dropdown(list(FILLS), value="original", label="Under the mask to begin with"),
        "only_masked": gr.Checkbox(False, label="Draw the surroundings of the mask alone, at full size"),
    }  # fmt: skip


def _outpaint(desk: Desk) -> Parts:
    parts: Parts = {
        "ground": gr.Image(label="Put ground around this", type="filepath", image_mode=None, height=240, buttons=[])
    }
    step = desk.pipeline.model.family.size // 4
    with gr.Row():
        for side in ("left", "right", "up", "down"):
            parts[side] = gr.Number(
                step if side in ("left", "right") else 0, label=f"{side}, px", precision=0, minimum=0, min_width=70
            )
    return parts


def _upscale(desk: Desk) -> Parts:
    return {
        "small": gr.Image(label="Enlarge this", type="filepath", image_mode=None, height=240, buttons=[]),
        "upscale": gr.Slider(1, 8, 2, step=0.25, label="Times"),
        "upscaler": gr.Dropdown([OWN, *UPSCALERS, *packaged_upscalers()], value=OWN, label="Upscaler"),
        "upscale_strength": gr.Slider(0, 1, 0.2, step=0.01, label="Strength: how much is drawn anew"),
    }


_MODES: dict[str, Callable[[Desk], Parts]] = {
    "text": _words, "picture": _picture, "inpaint": _inpaint, "outpaint": _outpaint, "upscale": _upscale,
}  # fmt: skip


def _advanced(desk: Desk) -> Parts:
    family = desk.pipeline.model.family
    usual = family.defaults
    parts: Parts = {}

    def number(name: str, label: str, hint: str) -> None:  # Gradio's own field of numbers turns blanks into 0
        parts[name] = gr.Textbox("", label=label, placeholder=hint, lines=1, max_lines=1, min_width=90)

    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        with gr.Row():
            number("width", "Width, px", str(family.size))
            number("height", "Height, px", str(family.size))
            number("count", "Pictures", "1")
        with gr.Row():
            number("steps", "Steps", str(usual.steps))
            number("guidance", "Guidance", f"{usual.guidance:g}")
            number("seed", "Seed", "random")
        with gr.Row():
            parts["sampler"] = gr.Dropdown([OWN, *sorted(SAMPLERS)], value=OWN, label=f"Sampler ({usual.sampler})")
            parts["schedule"] = gr.Dropdown([OWN, *sorted(SCHEDULES)], value=OWN, label="Schedule")
        parts["hires"] = gr.Checkbox(False, label="A second pass, larger (of pictures from words)")
        with gr.Row():
            parts["hires_scale"] = gr.Slider(1, 4, 2, step=0.25, label="Larger by")
            parts["hires_strength"] = gr.Slider(0, 1, 0.7, step=0.01, label="Strength")
        parts["more"] = gr.Textbox(label="More fields of the job, in JSON", placeholder='{"clip_skip": 2}', lines=1)
    return parts


def _networks(desk: Desk) -> Parts:
    shelf = desk.pipeline.extras.shelf
    loras, words, controls = (sorted(shelf.files(kind)) for kind in ("lora", "embedding", "control"))
    parts: Parts = {}
    with gr.Accordion("Adapters", open=False), gr.Row(elem_classes="line"):
        parts["lora"] = gr.Dropdown(["", *loras], value="", label=f"LoRA ({len(loras)} here)")
        parts["lora_strength"] = gr.Slider(-2, 2, 1, step=0.05, label="Strength")
        parts["add_lora"] = gr.Button("Put into prompt", size="sm")
        parts["word"] = gr.Dropdown(["", *words], value="", label=f"Embedding ({len(words)} here)")
        parts["add_word"] = gr.Button("Put into prompt", size="sm")
    makers = [*annotators(), *sorted(shelf.files("vision"))]  # IP-Adapters name their image encoder there
    with gr.Accordion("Control", open=False):
        with gr.Row():
            parts["control"] = gr.Dropdown(["", *controls], value="", label=f"Network ({len(controls)} here)")
            parts["annotate"] = gr.Dropdown([OWN, *makers], value=OWN, label="Hint made by (its own: it is the hint)")
        parts["control_picture"] = gr.Image(
            label="Picture that steers", type="filepath", image_mode=None, height=200, buttons=[]
        )
        parts["control_weight"] = gr.Slider(0, 2, 1, step=0.05, label="Weight")
    return parts


def _recipe() -> Parts:
    with gr.Accordion("Recipe of a picture", open=False):
        file = gr.File(
            label="Drop a PNG; its recipe fills the form", file_types=["image"], height=110, elem_id="recipe"
        )
    return {"recipe": file}


def _easel() -> Parts:
    """The right side: what is drawn."""
    parts: Parts = {"job": gr.State(""), "shown": gr.State([]), "which": gr.State(0)}
    parts["message"] = gr.HTML(look.line("", ""), elem_id="message")
    parts["preview"] = gr.Image(
        label="Preview", interactive=False, visible=False, height=560, elem_id="preview", buttons=[], format="png"
    )
    parts["pictures"] = gr.Gallery(
        label="Pictures", interactive=False, columns=2, height=560, object_fit="contain", preview=True,
        show_label=False, elem_id="pictures", buttons=["download", "fullscreen"],
    )  # fmt: skip
    with gr.Row(elem_id="send"):
        parts["send"] = {
            name: gr.Button(f"→ {label}", size="sm", interactive=False, min_width=80) for name, label in TABS[1:]
        }
    return parts


def _results() -> Parts:
    parts: Parts = {"listed": gr.State([]), "chosen": gr.State(0)}
    with gr.Row():
        parts["search"] = gr.Textbox(show_label=False, placeholder="Words of the prompt", scale=4, elem_id="search")
        parts["look"] = gr.Button("Search", scale=1)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=340):
            parts["gallery"] = gr.Gallery(
                show_label=False, interactive=False, columns=5, height=620, object_fit="contain", elem_id="gallery",
                buttons=["download", "fullscreen"],
            )  # fmt: skip
        with gr.Column(scale=2, min_width=300):
            parts["about"] = gr.HTML("", elem_id="about")
            with gr.Row():
                parts["resend"] = {name: gr.Button(f"→ {label}", size="sm", min_width=80) for name, label in TABS[1:]}
            parts["again"] = gr.Button("Use its recipe", size="sm")
    return parts


def _wire_drawing(parts: Parts, desk: Desk, whose: Whose) -> None:
    names = ("job", "message", "preview", "pictures", "shown", "which", "draw", "cancel", "send")
    outputs = [part for name in names for part in (parts[name].values() if name == "send" else [parts[name]])]

    async def draw(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        try:
            user = whose(request)
            plain = job_of(dict(zip(FIELDS, values, strict=True)), desk.stores)
            async for sight in watched(desk, user, plain):
                yield _seen(sight, plain, request)
        except ValueError as error:
            yield _refused(desk.worker.plain(str(error)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    asked = inspect.Parameter("request", kind, annotation=gr.Request)
    # Gradio's API calls the fields by these names
    own = [inspect.Parameter(name, kind, default=getattr(parts[name], "value", None)) for name in FIELDS]
    named = inspect.Signature([asked, *own])
    draw.__signature__ = named  # type: ignore[attr-defined]
    draw.__annotations__ = {"request": gr.Request}
    ordered = [parts[name] for name in FIELDS]
    parts["draw"].click(
        draw, ordered, outputs, api_name="draw", show_progress="hidden", concurrency_limit=None,
        trigger_mode="once",
    )  # fmt: skip

    def cancel(id: str, request: gr.Request) -> str:
        desk.cancel(id, whose(request))
        return look.line("cancelling …", "quiet")

    parts["cancel"].click(
        cancel, parts["job"], parts["message"], api_visibility="private", show_progress="hidden", concurrency_limit=None
    )


def _seen(sight: Sight, plain: dict[str, Any], request: gr.Request) -> list[Any]:
    """What the drawing's outputs become."""
    over = sight.state in OVER
    results = zip(sight.results, sight.told, strict=True)
    drawn = [Drawn(name, {**plain, "seed": sight.seed + n}, told) for n, (name, told) in enumerate(results)]
    picture = gr.skip() if sight.preview is None else gr.update(value=Image.fromarray(sight.preview), visible=True)
    pictures: Any = gr.skip()
    if sight.state == DONE:
        picture = gr.update(visible=False)
        pictures = gr.update(
            value=[(_url(request, each), f"seed {each.seed}{look.verdict(each.told)}") for each in drawn],
            visible=True,
            selected_index=0,
        )
    elif sight.preview is not None:
        pictures = gr.update(visible=False)
    if over and sight.state != DONE:
        picture, pictures = gr.update(visible=False), gr.update(visible=True)
    send = gr.update(interactive=bool(drawn)) if over else gr.skip()
    return [
        sight.id, _told(sight), picture, pictures, drawn if drawn else gr.skip(), 0,
        gr.update(interactive=over), gr.update(interactive=not over), *[send] * len(TARGETS),
    ]  # fmt: skip


def _told(sight: Sight) -> str:
    if sight.state == DONE:
        several = (
            f"seeds {sight.seed} to {sight.seed + len(sight.results) - 1}"
            if len(sight.results) > 1
            else f"seed {sight.seed}"
        )
        flagged = [told for told in sight.told if told.flagged]
        more = f"{look.verdict(flagged[0])}: {len(flagged)} of {len(sight.told)}" if flagged else ""
        return look.line(f"drawn in {sight.seconds or 0:.1f} s · {several}{more}", "quiet")
    if sight.state == CANCELLED:
        return look.line("cancelled", "quiet")
    if sight.state in OVER:
        return look.line(sight.error or "it failed", "wrong")
    return look.progress(sight.done, sight.total)


def _refused(message: str) -> list[Any]:
    """The outputs where there is no job: one line, and all as it was."""
    return [
        "", look.line(message, "wrong"), gr.update(visible=False), gr.update(visible=True), gr.skip(), gr.skip(),
        gr.update(interactive=True), gr.update(interactive=False), *[gr.skip()] * len(TARGETS),
    ]  # fmt: skip


def _url(request: gr.Request, drawn: Drawn) -> str:
    """Where a result is for the browser that asks: at our own door, which shows each user only their own."""
    asked = request.request
    scheme = asked.headers.get("x-forwarded-proto", asked.url.scheme) if asked is not None else "http"
    return f"{scheme}://{request.headers['host']}/v1/results/{drawn.sha256}.png"


def _wire_form(parts: Parts) -> None:
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    prompt, strength = parts["prompt"], parts["lora_strength"]
    parts["add_lora"].click(with_lora, [prompt, parts["lora"], strength], prompt, **quiet)
    parts["add_word"].click(with_word, [prompt, parts["word"]], prompt, **quiet)

    def read(path: str | None) -> list[Any]:
        if not path:
            return [gr.skip()] * (len(FILLED) + 1)
        try:
            return [*_filled(form_of(Path(path))), look.line("the recipe is in the form", "quiet")]
        except ValueError as error:
            return [*[gr.skip()] * len(FILLED), look.line(" ".join(str(error).split()), "wrong")]

    outputs = [*[parts[name] for name in FILLED], parts["message"]]
    parts["recipe"].upload(read, parts["recipe"], outputs, api_name="recipe", show_progress="hidden")


def _filled(form: dict[str, Any]) -> list[Any]:
    """What a form's values do to the parts in FILLED."""
    lists = ("sampler", "schedule")
    return [gr.update(value=form.get(name) or (OWN if name in lists else form.get(name))) for name in FILLED]


def _wire_results(parts: Parts, tab: gr.Tab, desk: Desk, whose: Whose) -> None:
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def look_up(text: str, request: gr.Request) -> tuple[Any, list[Drawn], str]:
        drawn = found(desk, whose(request), text)
        about = look.line("" if drawn else "nothing is drawn yet, or nothing with these words", "quiet")
        return gr.update(value=[(_url(request, each), each.job.get("prompt", "")) for each in drawn]), drawn, about

    def choose(listed: list[Drawn], event: gr.SelectData) -> tuple[int, str]:
        return event.index, look.recipe(listed[event.index].job, listed[event.index].told)

    search = [parts["gallery"], parts["listed"], parts["about"]]
    gr.on(
        [tab.select, parts["look"].click, parts["search"].submit], look_up, parts["search"], search,
        api_name="results", show_progress="hidden",
    )  # fmt: skip
    parts["gallery"].select(choose, parts["listed"], [parts["chosen"], parts["about"]], **quiet)

    def number(event: gr.SelectData) -> int:
        return event.index

    parts["pictures"].select(number, None, parts["which"], **quiet)
    for buttons, listed, which in (("send", "shown", "which"), ("resend", "listed", "chosen")):
        for mode, button in parts[buttons].items():
            outputs = [parts[TARGETS[mode]], parts["modes"], parts["mode"], parts["pages"], parts["prompt"]]
            button.click(partial(_sent, desk, mode), [parts[listed], parts[which]], outputs, **quiet)

    def again(listed: list[Drawn], which: int) -> list[Any]:
        path = desk.stores.results.path(listed[which].sha256) if which < len(listed) else None
        if path is None:
            return [gr.skip()] * (len(FILLED) + 1)
        return [*_filled(form_of(path)), gr.update(selected="draw")]

    outputs = [*[parts[name] for name in FILLED], parts["pages"]]
    parts["again"].click(again, [parts["listed"], parts["chosen"]], outputs, **quiet)


def _sent(desk: Desk, mode: str, listed: list[Drawn], which: int) -> list[Any]:
    """A result goes into a mode's picture, and that mode comes to the front with its prompt."""
    path = desk.stores.results.path(listed[which].sha256) if which < len(listed) else None
    if path is None:
        return [gr.skip()] * 5
    with Image.open(path) as picture:
        pixels: Any = Image.fromarray(flattened(np.asarray(picture)))
    value = {"background": pixels, "layers": [], "composite": None} if mode == "inpaint" else pixels
    prompt = listed[which].job.get("prompt", "")
    return [gr.update(value=value), gr.update(selected=mode), mode, gr.update(selected="draw"), prompt]
