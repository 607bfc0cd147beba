"""Every option that a message, a help text or a docstring names exists on some command."""

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

from l2r2_cli.commands import app

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted(p for package in ("l2r2_models", "l2r2_cli") for p in (ROOT / package).rglob("*.py"))
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_]*(?:-[a-z0-9_]+)*")
OTHERS = {
    "--force-download": "hf download",
    "--head": "ray start",
    "--standalone": "torchrun",
    "--nproc_per_node": "torchrun",
}


def existing() -> set[str]:
    """Every option of every command, with the forms that switch it off."""
    top = get_command(app)
    commands = [top, *(command.load() if hasattr(command, "load") else command for command in top.commands.values())]
    found = {option for command in commands for p in command.params for option in (*p.opts, *p.secondary_opts)}
    return {*found, "--help"}


def quoted(path: Path) -> set[str]:
    """The options in the string literals of a module, f-strings and docstrings included."""
    texts = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    return {option for text in texts if isinstance(text, str) for option in OPTION.findall(text)}


@pytest.fixture(scope="module")
def options():
    return existing()


def test_options_in_messages_exist(options):
    unknown = {str(path.relative_to(ROOT)): sorted(quoted(path) - options - OTHERS.keys()) for path in SOURCES}
    assert not {path: names for path, names in unknown.items() if names}


def test_the_options_of_other_tools_are_still_mentioned(options):
    assert OTHERS.keys() <= set().union(*map(quoted, SOURCES)) and not OTHERS.keys() & options
