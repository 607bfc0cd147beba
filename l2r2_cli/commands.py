"""Train, evaluate and publish image classifiers that look at the object first."""

from __future__ import annotations

import logging
import os
import sys

import typer

from . import (
    audit,
    composite,
    demo,
    derive,
    evaluate,
    evaluate_boxes,
    explain,
    export,
    finetune,
    fuse,
    import_set,
    list_models,
    localize,
    predict,
    publish,
    publish_kernels,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command("list")(list_models.list_models)
app.command("localize")(localize.localize)
app.command("evaluate-boxes")(evaluate_boxes.evaluate_boxes)
app.command("finetune")(finetune.finetune)
app.command("fuse")(fuse.fuse)
app.command("evaluate")(evaluate.evaluate)
app.command("audit")(audit.audit)
app.command("predict")(predict.predict)
app.command("explain")(explain.explain)
app.command("publish")(publish.publish)
app.command("publish-kernels")(publish_kernels.publish_kernels)
app.command("export")(export.export)
app.command("derive")(derive.derive)
app.command("convert")(derive.convert)
app.command("composite")(composite.composite)
app.command("import")(import_set.import_set)
app.command("demo")(demo.demo)


def main() -> None:
    """Run the command: invalid input is one sentence and exit status 1. An interruption is left to `l2r2_cli.main`."""
    _set_up_logging()
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        typer.echo(f"error: {sentence}", err=True)
        sys.exit(1)


def _sentence(error: Exception) -> str | None:
    """What to tell the user about an error; None for one that is a bug of ours."""
    from l2r2_models.errors import L2R2Error, printable  # imported by whichever command raised the error

    if isinstance(error, L2R2Error):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:  # a name of 300 characters, a full disk
        return f"{printable(str(error.filename))}: {error.strerror}."
    return None


def _set_up_logging() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_printable)
    logging.getLogger("l2r2_models").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: every line would appear twice


def _is_printable(record: logging.LogRecord) -> bool:
    """Replace control characters in a message, which may name a file, so that the terminal does not obey them."""
    from l2r2_models.errors import printable

    record.msg, record.args = printable(record.getMessage()), ()
    return True
