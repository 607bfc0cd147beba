"""The README, CONTRIBUTING and the pages of docs/, and their contents: code blocks, commands, options, links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "<!-- not run"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:l2r2|python -m torch\.distributed\.run .* -m l2r2_models) (?=[a-z])")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and whether the line before it says that it is not run."""

    language: str
    text: str
    runs: bool


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2], not text[: m.start()].rstrip().splitlines()[-1].startswith(NOT_RUN)) for m in FENCE.finditer(text)]


def commands(page: Path) -> list[list[str]]:
    """Arguments after `l2r2` of every command line in the page's code, without comments; torchrun's lines too."""
    text = page.read_text(encoding="utf-8")
    indented = re.findall(r"^    (.*)$", FENCE.sub("", text), re.MULTILINE)
    code = "\n".join([*(block.text for block in blocks(page)), *indented])
    lines = code.replace("\\\n", " ").splitlines()
    return [shlex.split(COMMAND.sub("", line.strip()), comments=True) for line in lines if COMMAND.match(line.strip())]


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks in the text."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))]


def links(page: Path) -> list[str]:
    """Targets of links and pictures that point into the repository, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
