"""The `l2r2` application: its commands, and the handling of their errors."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .common import Refusal

# name: module and function, and summary in the list of commands; the module is imported when its command is called
COMMANDS = {
    "list": ("list_models:list_models", "Show the models and their pretrained tags."),
    "localize": ("localize:localize", "Find objects in images and write a box file."),
    "evaluate-boxes": ("evaluate_boxes:evaluate_boxes", "Compare a box file with the true boxes."),
    "finetune": ("finetune:finetune", "Train a model on your images."),
    "fuse": ("fuse:fuse", "Fit the fusion of a run on held-out images."),
    "prior": ("prior:prior", "Fit a prior on metadata such as habitat and month."),
    "evaluate": ("evaluate:evaluate", "Evaluate every branch and every fusion of a run."),
    "audit": ("audit:audit", "Measure how much a classifier relies on backgrounds."),
    "predict": ("predict:predict", "Classify images and give the reasons."),
    "benchmark": ("benchmark:benchmark", "Measure how long each stage of a prediction takes."),
    "explain": ("explain:explain", "Explain predictions with saliency maps and counterfactuals."),
    "app": ("app:app", "Show predictions and their reasons in the browser."),
    "serve": ("serve:serve", "Answer HTTP requests with predictions."),
    "publish": ("publish:publish", "Publish a run on the Hugging Face Hub."),
    "publish-kernels": ("publish_kernels:publish_kernels", "Publish the kernels on the Hugging Face Hub."),
    "export": ("export:export", "Export a run to ONNX, OpenVINO, Core ML or torch.export."),
    "derive": ("derive:derive", "Make a run from a timm classifier, without training."),
    "convert": ("derive:convert", "Join separately trained networks, or split a run."),
    "composite": ("composite:composite", "Make a data set with misleading backgrounds."),
    "import": ("import_set:import_set", "Convert a published benchmark to a data set."),
    "demo": ("demo:demo", "Train two small models and swap the backgrounds."),
}


class _Command(TyperCommand):
    """A command with a name and a summary; the rest is imported when it is called."""

    def __init__(self, name: str, place: str, summary: str) -> None:
        super().__init__(name, short_help=summary)
        self.place = place

    def load(self) -> Any:
        """Import the command with its options."""
        module, _, function = self.place.partition(":")
        alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        alone.command(self.name)(getattr(import_module(f".{module}", __package__), function))
        return typer.main.get_command(alone)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command and parse its arguments."""
        _set_up_logging()
        return self.load().make_context(info_name, args, parent, **extra)


class _Group(TyperGroup):
    """All commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, (place, summary) in COMMANDS.items():
            self.add_command(_Command(name, place, summary))


# rich would double the time that --help takes
app = typer.Typer(cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _show_version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(version("l2r2-models"))
        raise typer.Exit


@app.callback(help="Train, evaluate and publish image classifiers that look at the object first.")
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; invalid input prints one sentence and exits with status 1. `l2r2_cli.main` handles interruptions."""
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
    """Return the message for an error of the user, or None for a bug."""
    if isinstance(error, Refusal):
        return str(error)
    from l2r2_models.errors import L2R2Error, printable  # already imported by the command that raised the error

    if isinstance(error, L2R2Error):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:  # e.g. a name of 300 characters, or a full disk
        return f"{printable(str(error.filename))}: {error.strerror}."
    return None


def _set_up_logging() -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_printable)
    logging.getLogger("l2r2_models").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it has its own handler; every line would appear twice


def _is_printable(record: logging.LogRecord) -> bool:
    """Escape control characters in a log message, which may contain a file name."""
    from l2r2_models.errors import printable

    record.msg, record.args = printable(record.getMessage()), ()
    return True
