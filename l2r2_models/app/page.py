"""The page, made with Gradio: what is on it, and what each control does."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import markup
from .audited import COUNTS, USUAL, Folder
from .handlers import Handlers, auditing
from .studio import Studio

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio import Blocks

HOUR = 3600  # seconds until a photo is forgotten, and until a file that an interrupted upload left is removed
WAITING = 32  # clicks that may wait


class Controls(NamedTuple):
    """The components of the page that do or show something."""

    photo: Any
    upload: Any
    notice: Any
    stage: Any
    tools: Any
    find: Any
    whole: Any
    reset: Any
    objects: Any
    parts: Any
    metadata: list[Any]
    box: Any
    saliency: Any
    answers: Any
    maps: Any
    other: Any
    picker: Any
    second: Any
    back: Any
    elsewhere: Any


def create_app(studio: Studio, folder: Path, megabytes: int = 20, audited: Folder | None = None) -> FastAPI:
    """Create the web application.

    Args:
        studio: the model.
        folder: temporary folder for uploads, which are removed once they are read, and for the reports of audits.
        megabytes: maximum size of a file.
        audited: data set whose audit the page offers, or None.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    import gradio as gr
    from fastapi import FastAPI

    fonts: dict[str, Any] = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none is loaded
    app: FastAPI = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        _page(studio, folder, audited),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=megabytes * 2**20,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        theme=gr.themes.Default(**fonts),
        css=_asset("style.css"),
    )
    return app


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _page(studio: Studio, folder: Path, audited: Folder | None) -> Blocks:
    import gradio as gr

    name = Path(studio.predictor.checkpoint.name).name
    page: Blocks = gr.Blocks(title=f"L2R2: {name}", analytics_enabled=False, delete_cache=(HOUR, HOUR))
    with page:
        gr.HTML(markup.heading(name, studio.predictor.rules))
        if audited is None:
            _connect(_controls(studio), Handlers(studio))
        else:
            with gr.Tab("One photo"):
                _connect(_controls(studio), Handlers(studio))
            with gr.Tab("Audit of a folder"):
                _audit(audited, folder)
    page.queue(max_size=WAITING, api_open=False)
    page.has_launched = True  # else Gradio lets a request name any file of this machine as an upload
    return page


def _controls(studio: Studio) -> Controls:
    import gradio as gr

    photo = gr.State(None, time_to_live=HOUR)
    notice = gr.HTML(elem_id="notice")
    file: dict[str, Any] = dict(file_types=["image"], height=120)
    button: dict[str, Any] = dict(min_width=120, size="md")
    parts = [str(k) for k in range(studio.parts)]
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            upload = gr.File(label="Photo", elem_id="photo", **file)
            stage = gr.HTML(markup.stage(None), js_on_load=_asset("draw.js"), elem_id="stage")
            with gr.Column(visible=False) as tools:
                with gr.Row():
                    find = gr.Button("Find the object", visible=studio.localizer is not None, elem_id="find", **button)
                    whole = gr.Button("Whole image", elem_id="whole", **button)
                with gr.Row(visible=studio.uses_mask):
                    _brush()
                    reset = gr.Button("Reset the mask", elem_id="reset", **button)
                objects = gr.Radio([], label="Object", type="index", visible=False, elem_id="objects")
                used = gr.CheckboxGroup(parts, value=parts, label="Parts to use", visible=bool(parts), elem_id="parts")
                with gr.Row(visible=bool(studio.columns)):
                    metadata = [
                        gr.Dropdown([("not known", ""), *values], value="", label=name, min_width=140, elem_classes="metadata")
                        for name, values in studio.columns.items()
                    ]
                box = gr.Textbox(label="Box in pixels: x0, y0, x1, y1", max_lines=1, elem_id="box")
                saliency = gr.Checkbox(label="Show where each prediction comes from", elem_id="saliency")
        with gr.Column(scale=6, min_width=300):
            answers, maps = gr.HTML(markup.answers(None), elem_id="answers"), gr.HTML(elem_id="maps")
    with gr.Column(visible=False) as other:
        with gr.Row():
            gr.HTML("<h2>Another background</h2>", min_width=160)
            back = gr.Button("Back to its own", scale=0, min_width=150, size="sm", elem_id="back")
        picker = gr.HTML(markup.picker(studio), js_on_load=_asset("pick.js"), visible=bool(studio.backgrounds), elem_id="picker")
        second = gr.File(label="Background photo", elem_id="second", **file)
        elsewhere = gr.HTML(elem_id="elsewhere")
    tool = (tools, find, whole, reset, objects, used, metadata, box, saliency)
    return Controls(photo, upload, notice, stage, *tool, answers, maps, other, picker, second, back, elsewhere)


def _brush() -> None:
    """Make the choice between box and brush; only draw.js reads it."""
    import gradio as gr

    gr.Radio(markup.TOOLS, value="box", label="Drag on the photo to", interactive=True, min_width=300, elem_id="tool")
    gr.Slider(1, 30, 8, step=1, label="Brush in % of the width", interactive=True, min_width=300, elem_id="brush")


def _connect(c: Controls, to: Handlers) -> None:
    """Connect the controls with what they do; one click at a time runs the model."""
    given = [c.photo, c.saliency]
    shown = [c.photo, c.notice, c.stage, c.tools, c.objects, c.parts, c.box, c.answers, c.maps, c.other, c.elsewhere]
    do: dict[str, Any] = dict(concurrency_id="model", concurrency_limit=1, show_progress="minimal", api_visibility="private")
    studio = to.studio
    found = None if studio.localizer is None else studio.find
    c.upload.upload(to.after_upload(studio.open, found), [*given, c.upload], [*shown, c.upload], **do)
    c.second.upload(to.after_upload(to.needs_photo(studio.put_on_photo)), [*given, c.second], [*shown, c.second], **do)
    marked = to.after_event(box=studio.draw, stroke=studio.paint)
    c.stage.select(marked, given, shown, trigger_mode="multiple", **do)  # strokes follow each other quickly
    c.picker.select(to.after_event(index=studio.put_on), given, shown, **do)
    c.reset.click(to.after(studio.reset_mask), given, shown, **do)
    c.box.submit(to.after(studio.write), [*given, c.box], shown, **do)
    c.objects.input(to.after(studio.choose), [*given, c.objects], shown, **do)
    c.parts.input(to.after(studio.use_parts), [*given, c.parts], shown, **do)
    for column in c.metadata:
        column.change(to.after(studio.describe), [*given, *c.metadata], shown, **do)
    c.find.click(to.after(studio.find), given, shown, **do)
    c.whole.click(to.after(studio.whole), given, shown, **do)
    c.back.click(to.after(studio.put_back), given, shown, **do)
    c.saliency.input(to.after(lambda photo: photo), given, shown, **do)


def _audit(audited: Folder, folder: Path) -> None:
    """Make the page of the audit; one audit runs at a time."""
    import gradio as gr

    notice = gr.HTML(elem_classes="notices")
    gr.HTML(f'<p class="hint">{markup.ABOUT_AUDIT}</p>')
    with gr.Row():
        splits = list(audited.splits)
        split = gr.Dropdown(splits, value=audited.split, label="Split", visible=bool(splits), min_width=160, elem_id="split")
        images = gr.Radio(list(COUNTS), value=USUAL, label="Images, drawn at random", min_width=200, elem_id="images")
    run = gr.Button("Run the audit", variant="primary", elem_id="run")
    result = gr.HTML(elem_id="audit")
    report = gr.DownloadButton("Download the whole report", visible=False, elem_id="report")
    do: dict[str, Any] = dict(concurrency_id="audit", concurrency_limit=1, api_visibility="private")
    run.click(auditing(audited, folder), [split, images], [notice, result, report], show_progress_on=result, **do)
