"""The README and docs/ are correct: links resolve, commands and options exist, Python runs, the site builds."""

import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import typer
from markdown_pages import PAGES, ROOT, blocks, commands, inline_code, links, name_of

from l2r2_cli.commands import app
from l2r2_models.io import parse_settings
from l2r2_models.localize import LOCALIZERS, PRESETS, LocalizerSpec
from l2r2_models.models.hub_configs import load_hub_configs
from l2r2_models.train.recipe import Recipe

COMMANDS = {name: command.load() for name, command in typer.main.get_command(app).commands.items()}
OPTIONS = {name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} | {"--help"} for name, c in COMMANDS.items()}
BUDGET = 1_000_000  # bytes of all pictures


@pytest.fixture(params=PAGES, ids=name_of)
def page(request):
    return request.param


def test_links_lead_to_files(page):
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing


def test_commands_parse(page):
    """Each command line is taken by the option parser as it stands: command, options, number of arguments, kinds of values."""
    for name, *arguments in commands(page):
        assert name in COMMANDS, name
        given = COMMANDS[name].make_context(name, list(arguments)).params
        keys = parse_settings(given.get("settings") or [])
        assert set(keys) <= {f.name for f in fields(Recipe)}, arguments
        if spec := given.get("localizer"):
            assert LocalizerSpec.parse(spec).name in (*PRESETS, *LOCALIZERS)


def test_options_in_the_text_exist(page):
    everywhere = set().union(*OPTIONS.values())
    for code in inline_code(page):
        if code.startswith("python "):  # options of other programs
            continue
        named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code)
        command = re.match(r"l2r2 ([a-z-]+)", code)
        assert set(named) <= (OPTIONS[command[1]] if command else everywhere), code


@pytest.fixture
def workspace(page, run, tmp_path, monkeypatch):
    """A folder with the runs, models, photos and boxes that the snippets name."""
    import shutil

    from PIL import Image

    for name in ("fungi", "digits"):
        shutil.copytree(run, tmp_path / "runs" / name)
    (tmp_path / "fungi" / "chanterelle").mkdir(parents=True)
    for file in ("photo.jpg", "fungi/chanterelle/001.jpg"):
        Image.effect_noise((500, 420), 60).convert("RGB").save(tmp_path / file)
    (tmp_path / "boxes.json").write_text('{"fungi/chanterelle/001.jpg": [[10, 20, 300, 400]]}')
    if "models/clip" in page.read_text():
        from vlm_cases import clip

        clip(tmp_path / "models" / "clip")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_python_runs(page, workspace, capsys):
    """The Python of a page runs from top to bottom; what is marked as not run compiles."""
    namespace = {}
    for block in blocks(page):
        if block.language == "python":
            code = compile(block.text, name_of(page), "exec")
            if block.runs:
                exec(code, namespace)


def test_the_table_of_models_matches_the_hub_configs():
    page = (ROOT / "docs" / "models.md").read_text()
    defaults = [c for c in load_hub_configs() if c.default]
    for c in defaults:
        top1 = "" if c.top1 is None else f"{c.top1:.1f}"
        row = f"| `{c.architecture}` | {c.parameters / 1e6:.1f} M | {c.input_size} | `{c.tag}` | {top1} | {c.license} |"
        assert row in page, c.architecture
    assert len(re.findall(r"^\| `(l2r2|ifam)_", page, re.MULTILINE)) == len(defaults)


def test_every_localizer_and_fusion_is_documented():
    from l2r2_models.fusion import FUSIONS

    localizers, method = ((ROOT / "docs" / name).read_text() for name in ("guides/localizers.md", "method.md"))
    assert not [name for name in LOCALIZERS if not re.search(rf"^\| `{name}[:`]", localizers, re.MULTILINE)]
    assert not [name for name in FUSIONS if f"| `{name}` |" not in method]


def test_the_readme_names_the_two_commands_and_stays_short():
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme and "make test" in readme
    assert len(readme.splitlines()) < 150


def test_pictures_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "pictures").iterdir()) < BUDGET


def test_the_site_builds_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's advertisement is no warning about the pages
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr[-3000:]
    pages = {p.relative_to(tmp_path / "site").as_posix(): p.read_text() for p in (tmp_path / "site").rglob("*.html")}
    assert pages["method.html"].count("<math") > 50 and "arithmatex" not in pages["method.html"]
    assert "forward_views" in pages["api/index.html"] and "<blockquote>" not in pages["api/index.html"]  # a bare >>> becomes one
    outside = [u for text in pages.values() for u in re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="(https?:[^"]+)"', text)]
    assert not outside  # nothing is loaded from elsewhere
