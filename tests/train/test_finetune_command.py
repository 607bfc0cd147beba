"""`l2r2 finetune` and its recipes on the command line."""

import re
import sys

import pytest

from l2r2_cli.commands import main


def call(monkeypatch, capsys, *arguments):
    """Runs the command in this process; its exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["l2r2", "finetune", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_recipe_of_a_run_gives_the_same_run_again(dataset, tmp_path, monkeypatch, capsys):
    first = ["--model", "timm:resnet10t", "--no-pretrained", "--size", 32, "--epochs", 1, "--set=ema=0.5", "--set=batch_size=6"]
    code, out, err = call(monkeypatch, capsys, dataset, *first, "-o", tmp_path / "one")
    assert code == 0 and "fg accuracy on the validation split" in out, err
    code, _, err = call(monkeypatch, capsys, dataset, "--recipe", tmp_path / "one" / "recipe.yaml", "-o", tmp_path / "two")
    assert code == 0, err
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert (tmp_path / "one" / "recipe.yaml").read_text() == (tmp_path / "two" / "recipe.yaml").read_text()


def test_a_redirected_training_prints_one_line_per_epoch_and_nothing_else_of_the_trainer(dataset, tmp_path, monkeypatch, capsys):
    options = ["--model", "timm:resnet10t", "--no-pretrained", "--size", 32, "--epochs", 3, "--set=batch_size=6"]
    code, out, err = call(monkeypatch, capsys, dataset, *options, "-o", tmp_path / "run")
    assert code == 0, err
    number = r"\d+\.\d"
    pattern = rf"epoch (\d)/3  loss {number}+  full {number} %, fg {number} %, fused {number} %  {number} images/s  \d+:\d\d left"
    lines = [line for line in err.splitlines() if line.startswith("epoch")]
    assert [re.fullmatch(pattern, line)[1] for line in lines] == ["1", "2", "3"] and lines[-1].endswith("0:00 left")
    assert not {"{", "\r"} & set(out + err) and "epoch" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "timm:resnet10t", "--lr", "1", "--set", "lr=2"], "lr is given twice, by its option and by --set"),
        (["--model", "timm:resnet10t", "--set", "epoch=2"], 'Unknown recipe key "epoch"; close matches: epochs'),
        (["--recipe", "fine-tune"], "; pass a YAML file or one of few_images, finetune, head_only, scratch"),
        (["--recipe", "head_only"], "no model is set; pass --model"),
    ],
)
def test_slips_end_in_one_sentence(dataset, tmp_path, monkeypatch, capsys, options, message):
    code, out, err = call(monkeypatch, capsys, dataset, *options, "-o", tmp_path / "run")
    assert code == 1 and not out and f"error: {err.split('error: ')[1]}" == err and message in err
    assert not (tmp_path / "run").exists()
