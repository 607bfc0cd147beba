"""Use of the rows by `finetune`: swapped backgrounds, occlusion, held-out ends, and near-duplicate warnings."""

import json
from dataclasses import replace

import pytest
from conftest import write_dataset

from l2r2_cli.commands import main
from l2r2_models import L2R2Error
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe

RECIPE = Recipe("timm:resnet10t", pretrained=False, size=32, epochs=1, batch_size=8)


def l2r2(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["l2r2", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_options_reach_the_run_and_near_duplicates_are_reported_and_recorded(tmp_path, monkeypatch, capsys):
    data = write_dataset(tmp_path / "data", splits=("train", "test"))
    names = [(data / "images" / f"{split}_{i:03d}.png") for i in (9, 10) for split in ("train", "test")]
    names[1].write_bytes(names[0].read_bytes())  # the last row of a class, and a test image that is the same
    code = l2r2(
        monkeypatch,
        "finetune",
        data,
        "--model",
        "timm:resnet10t",
        "--no-pretrained",
        "--size",
        32,
        "--epochs",
        1,
        "--val-fraction",
        0.25,
        "--val-from",
        "end",
        "--background-swap",
        0.5,
        "--set",
        "occlusion=0.25",
        "-o",
        tmp_path / "run",
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["val_files"] == [f"images/train_{i:03d}.png" for i in (9, 10, 11)]
    assert {k: record["recipe"][k] for k in ("val_from", "background_swap", "occlusion")} == {
        "val_from": "end",
        "background_swap": 0.5,
        "occlusion": 0.25,
    }
    assert record["leaks"] == [] and "look like" not in said.err  # its twin is held out, not trained on

    names[3].write_bytes((data / "images" / "train_001.png").read_bytes())
    finetune(data, replace(RECIPE, val_fraction=0.25, val_from="end"), tmp_path / "other")
    record = json.loads((tmp_path / "other" / "run.json").read_text())
    (leak,) = record["leaks"]
    assert (leak["split"], leak["alike"], leak["example"]) == ("test", 1, ["images/test_010.png", "images/train_001.png"])
    assert any("1 of 12 test images look like training images" in note for note in record["notes"])


def test_swaps_and_occlusion_change_what_is_learned_and_a_run_can_be_repeated(tmp_path):
    data = write_dataset(tmp_path / "data")
    weights = []
    for i, change in enumerate(({}, {"background_swap": 1.0}, {"occlusion": 1.0}, {"background_swap": 1.0})):
        finetune(data, replace(RECIPE, **change), tmp_path / str(i))
        weights.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert len(set(weights)) == 3 and weights[1] == weights[3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"background_swap": 1.2}, "background_swap must lie between 0 and 1"),
        ({"occlusion": -0.1}, "occlusion must lie between 0 and 1"),
        ({"val_from": "start", "val_fraction": 0.1}, 'Unknown val_from "start"; choose from random, end'),
        ({"val_from": "end"}, "val_from has no effect without val_fraction"),
    ],
)
def test_settings_that_make_no_sense_are_named(wrong, message):
    with pytest.raises(L2R2Error, match=message):
        replace(RECIPE, **wrong)
