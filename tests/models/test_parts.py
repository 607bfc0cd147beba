"""The patches that an iFAM model keeps: metrics, and pictures on the page of `evaluate --report`."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import COLORS, write_dataset, write_run
from html_pages import Page
from PIL import Image
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.data.table import read_table
from l2r2_models.errors import L2R2Error
from l2r2_models.evaluate.parts import FoundParts, find_parts
from l2r2_models.report.parts import draw_parts

PATCH, GRID = 8, 4


def found_parts(part, true, keep=None, has_mask=None):
    part, true = torch.tensor(part), torch.tensor(true, dtype=torch.bool)
    keep = part < 2 if keep is None else torch.tensor(keep, dtype=torch.bool)
    has_mask = torch.ones(len(part), dtype=torch.bool) if has_mask is None else torch.tensor(has_mask)
    views = torch.full((len(part), 3, 16, 16), 128, dtype=torch.uint8)
    return FoundParts(list(range(len(part))), views, part, keep, true, has_mask, 2)


def test_metrics_by_hand():
    found = found_parts([[[0, 2], [1, 2]], [[2, 2], [2, 0]]], [[[1, 1], [0, 0]], [[0, 0], [0, 1]]])
    assert found.shares() == pytest.approx([0.25, 0.125, 0.625])
    assert found.occurrence() == pytest.approx([1, 0.5, 1])
    # first image: kept {00, 10}, true {00, 01}; second: kept and true are {11}
    assert found.agreement() == pytest.approx(
        {"iou": (1 / 3 + 1) / 2, "iou_of_everything": 0.375, "object_kept": 0.75, "background_kept": 0.25}
    )
    one = found_parts([[[0, 0], [0, 0]], [[2, 2], [2, 0]]], [[[0, 0], [0, 0]], [[0, 0], [0, 1]]], has_mask=[False, True])
    assert one.agreement()["iou"] == 1  # the first image has no mask, so it does not count
    assert found_parts([[[0, 0]]], [[[0, 0]]], has_mask=[False]).agreement() == {}


def test_a_picture_shows_parts_in_color_and_the_rest_dark():
    pixels = np.asarray(draw_parts(found_parts([[[0, 1], [2, 0]]], [[[0, 0], [0, 0]]], keep=[[[1, 1], [0, 0]]]), 0)).astype(int)
    side = len(pixels)
    corners = pixels[[2, 2, -3, -3], [2, -3, 2, -3]]
    assert side == 256 and abs(corners[0] - corners[1]).max() > 50  # two parts, two colors
    assert corners[2].max() < 64 and corners[3].max() < 64  # background, and a part that was dropped by hand


@pytest.fixture(scope="module")
def ifam(tmp_path_factory):
    """An ifam run whose prototypes are set so that bright patches are a part, and images with a bright square under a mask."""
    folder = tmp_path_factory.mktemp("parts")
    data = write_dataset(folder / "data", splits=("test",))
    (data / "masks").mkdir()
    with open(data / "metadata.csv", newline="") as file:
        rows = list(csv.reader(file))
    for row in rows[1:]:
        x0, y0, x1, y1 = map(int, row[3:7])
        mask = np.zeros((40, 60), np.uint8)
        mask[y0:y1, x0:x1] = 255
        Image.fromarray(mask).save(data / "masks" / (row[0].split("/")[1]))
    with open(data / "metadata.csv", "w", newline="") as file:
        named = [[*row, "masks/" + row[0].split("/")[1]] for row in rows[1:]]
        csv.writer(file).writerows([[*rows[0], "mask_file"], *named])
    torch.manual_seed(0)
    model = timm.create_model(
        "ifam_vit_tiny_patch16_224",
        num_classes=3,
        num_parts=2,
        img_size=PATCH * GRID,
        patch_size=PATCH,
        embed_dim=24,
        depth=1,
        num_heads=2,
    )
    model.view_spec = model.view_spec.from_pretrained_cfg(model.pretrained_cfg, size=PATCH * GRID, fg_mode="parts")
    hub.save_checkpoint(model, folder / "run", sorted(COLORS))
    return folder / "run", data


def test_what_is_found_is_what_the_model_sees(ifam):
    run, data = ifam
    checkpoint, test = hub.load_checkpoint(run), read_table(data).of_split("test")
    found = find_parts(checkpoint, test)
    assert found.part.shape == found.keep.shape == found.true.shape == (12, GRID, GRID) and found.has_mask.all()
    for row, true in zip(test.rows, found.true):  # the 40 x 60 image is padded to 60 x 60; a patch is 15 x 15 of that
        canvas = np.zeros((60, 60))
        x0, y0, x1, y1 = (int(v) for v in row.entry.boxes[0])
        canvas[y0 + 10 : y1 + 10, x0:x1] = 1
        covered = torch.from_numpy(canvas.reshape(GRID, 15, GRID, 15).mean((1, 3)))
        assert true[covered > 0.6].all() and not true[covered < 0.4].any()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (checkpoint.model.view_spec.mean, checkpoint.model.view_spec.std))
    near = checkpoint.model.find_parts((found.views / 255 - mean) / std).keep  # of pixels rounded to bytes
    assert (near == found.keep).float().mean() > 0.95
    assert len(find_parts(checkpoint, test, most=5).rows) == 5
    with checkpoint.model.intervened(drop_parts=[0]):
        dropped = find_parts(checkpoint, test)
    assert torch.equal(dropped.keep, found.keep & (found.part != 0)) and torch.equal(dropped.part, found.part)


def test_an_empty_mask_and_a_localizers_mask_are_no_true_masks(ifam, tmp_path):
    run, data = ifam
    checkpoint, test = hub.load_checkpoint(run), read_table(data).of_split("test")
    assert not find_parts(checkpoint, replace(test, boxes_from={"localizer": "sam:x"})).agreement()
    empty = tmp_path / "empty.png"
    Image.new("L", (60, 40)).save(empty)
    rows = [replace(row, mask_file=empty) if i else row for i, row in enumerate(test.rows)]
    found = find_parts(checkpoint, replace(test, rows=tuple(rows)))
    assert found.has_mask.tolist() == [True] + [False] * 11
    rows = [replace(row, entry=replace(row.entry, scores=(0.01,))) for row in test.rows]  # no box is used, the mask is
    assert torch.equal(find_parts(checkpoint, replace(test, rows=tuple(rows))).true, find_parts(checkpoint, test).true)


def test_the_page_shows_the_parts_of_an_ifam_run_only(ifam, tmp_path):
    run, data = ifam
    result = CliRunner().invoke(app, ["evaluate", str(run), str(data), "--report", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    found = find_parts(hub.load_checkpoint(run), read_table(data).of_split("test"))
    assert "Stage 1 finds 2 parts" in page.words and f"{100 * found.agreement()['iou']:.1f}" in page.words
    assert f"here {100 * found.keep.float().mean():.0f} % of all" in page.words and len(page.images) >= 12
    other = write_run(tmp_path / "run")
    CliRunner().invoke(app, ["evaluate", str(other), str(data), "--report", str(tmp_path / "other.html")])
    assert "Stage 1" not in (tmp_path / "other.html").read_text(encoding="utf-8")
    with pytest.raises(L2R2Error, match="does not find parts"):
        find_parts(hub.load_checkpoint(other), read_table(data))
