"""The `l2r2` command: one module a command, each thin: parse, call, print."""

from __future__ import annotations

import logging
import os
import sys

import typer

from ..errors import L2R2Error, printable
from . import (
    audit,
    composite,
    demo,
    derive,
    evaluate,
    evaluate_boxes,
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
app.command("publish")(publish.publish)
app.command("publish-kernels")(publish_kernels.publish_kernels)
app.command("export")(export.export)
app.command("derive")(derive.derive)
app.command("convert")(derive.convert)
app.command("composite")(composite.composite)
app.command("import")(import_set.import_set)
app.command("demo")(demo.demo)


def main() -> None:
    """Run the command: invalid input is one sentence and exit status 1. An interruption is left to `l2r2_cli`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_printable)
    logging.getLogger("l2r2_models").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: every line would stand there twice
    try:
        app()
    except L2R2Error as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a name of 300 characters, a full disk: whatever no one has a better sentence for
        if error.filename is None:
            raise
        typer.echo(f"error: {printable(str(error.filename))}: {error.strerror}.", err=True)
        sys.exit(1)


def _is_printable(record: logging.LogRecord) -> bool:
    """A message, which may name a file, with nothing in it that a terminal obeys."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True
