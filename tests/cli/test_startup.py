"""Fast startup: help, version, completion, list and usage errors import nothing heavy."""

import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
import typer
import yaml

import l2r2_models
from l2r2_cli.commands import COMMANDS, app
from l2r2_models.train.recipe import Recipe

HEAVY = {"torch", "timm", "numpy", "transformers", "PIL", "rich", "l2r2_models", "yaml", "huggingface_hub.file_download"}
PROGRAM = """
import sys, l2r2_cli
sys.argv[0] = "l2r2"
try:
    l2r2_cli.main()
finally:
    print("modules:", *sys.modules, file=sys.stderr)
"""


def l2r2(*arguments, **environment):
    """Runs a command in a process of its own: status, output, errors, and the modules that it imported."""
    variables = {**os.environ, "COLUMNS": "80", **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=variables)
    errors, _, modules = done.stderr.partition("modules:")
    return done.returncode, done.stdout, errors, set(modules.split())


def parameters(command):
    """The parameters of a command, as the parser knows them."""
    group = typer.main.get_command(app)
    with typer.Context(group, info_name="l2r2") as top:
        return group.get_command(top, command).make_context(command, [], parent=top, resilient_parsing=True).command.params


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "evaluate-boxes"),
        ([], 2, "evaluate-boxes"),
        (["--version"], 0, f"{l2r2_models.__version__}\n"),
        (["list"], 0, "l2r2_convnextv2_base "),
        (["list", "*vit_tiny*", "--pretrained", "--json"], 0, '"tag": "augreg_in21k"'),
        (["list", "nonsense"], 1, "error: No model matches 'nonsense'"),
        (["finetune", "--help"], 0, "--no-pretrained"),
        (["finetun"], 2, "No such command 'finetun'. Did you mean 'finetune'?"),
        (["predict"], 2, "Missing argument"),
        (["predict", "a", "b", "-o", "c", "--top", "0"], 2, "--top"),
        (["evaluate", "a", "b", "--nonsense"], 2, "No such option"),
        (["finetune", "x", "-o", "y", "--model", "l2r2_resnat50"], 1, "close names: l2r2_resnet50"),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path, arguments, code, said):
    status, out, errors, modules = l2r2(*arguments, HF_HOME=str(tmp_path))
    assert status == code and said in out + errors and "Traceback" not in errors
    assert "l2r2_cli.commands" in modules and not HEAVY & modules


def test_completion_prints_its_script_and_completes_commands_options_and_models():
    status, script, _, _ = l2r2(_L2R2_COMPLETE="source_bash")
    assert status == 0 and "complete -o default -F _l2r2_completion l2r2" in script
    for words, expected in {
        "l2r2 fi": {"finetune"},
        "l2r2 predict --box": {"--boxes", "--box-threshold"},
        "l2r2 finetune --model l2r2_resn": {"l2r2_resnet18", "l2r2_resnet50"},
        "l2r2 finetune --model l2r2_resnet18.a1": {"l2r2_resnet18.a1_in1k"},
    }.items():
        count = str(len(words.split()) - 1)
        _, found, _, modules = l2r2(_L2R2_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)
        assert set(found.split()) == expected and not HEAVY & modules, words


def test_a_model_name_cannot_drive_the_terminal():
    _, _, errors, _ = l2r2("finetune", "x", "-o", "y", "--model", "l2r2_\x1b[2J")
    assert "Unknown model" in errors and "\x1b" not in errors


def test_the_list_of_commands_shows_every_line_whole():
    _, out, _, _ = l2r2("--help")
    assert "Train, evaluate and publish image classifiers that look at the object first." in out
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", out, re.MULTILINE), name


def test_every_option_explains_itself_and_means_one_thing_everywhere():
    shared = {
        "--boxes",
        "--box-threshold",
        "--metadata",
        "--skip-bad",
        "--batch-size",
        "--cascade",
        "--device",
        "--workers",
        "--seed",
        "--report",
        "--json",
    }
    meanings = {}
    for command in COMMANDS:
        for parameter in parameters(command):
            assert parameter.help, (command, parameter.name)
            for option in shared & set(parameter.opts):
                meanings.setdefault(option, set()).add(parameter.help)
    assert meanings.keys() == shared and all(len(found) == 1 for found in meanings.values()), meanings


def test_the_defaults_that_the_help_of_finetune_shows_are_those_of_the_recipe():
    defaults = {f.name: f.default for f in fields(Recipe)}
    defaults["branches"] = ",".join(defaults["branches"])
    told = {p.name: p.show_default for p in parameters("finetune") if p.name in defaults and isinstance(p.show_default, str)}
    checked = {name: text for name, text in told.items() if re.fullmatch(r"[\d.]+|random|full,fg", text)}
    assert checked == {
        name: f"{defaults[name]:g}" if name not in ("val_from", "branches") else defaults[name] for name in checked
    }
    assert len(checked) >= 8 and defaults["shared"] and defaults["pretrained"]


def test_keys_shows_every_key_of_a_recipe_with_its_default():
    status, out, errors, _ = l2r2("finetune", "--keys")
    assert status == 0, errors
    assert yaml.safe_load(out) == {
        f.name: None if f.default is MISSING else list(f.default) if isinstance(f.default, tuple) else f.default
        for f in fields(Recipe)
    }
    assert all(re.fullmatch(r"\w+: .+  # .{10,}", line) for line in out.splitlines())


def test_freed_memory_is_kept_for_the_next_tensors():
    """Counts page faults of a buffer that is allocated again and again; a convolution does the same with its output."""
    code = """
import l2r2_cli, resource, numpy
{}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        numpy.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), print(faults())
"""
    runs = [[sys.executable, "-c", code.format(call)] for call in ("", "l2r2_cli.keep_freed_memory()")]
    default, kept = (int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for run in runs)
    assert kept < default / 4
