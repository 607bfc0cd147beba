"""Training images are decoded no finer than their views need after augmentation, and show what the whole image shows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from l2r2_models.boxes import BoxEntry
from l2r2_models.data.augment import Augment
from l2r2_models.data.dataset import ViewDataset
from l2r2_models.data.table import ImageTable, Row
from l2r2_models.images import LazyImage
from l2r2_models.views import ViewSpec

BOX = (400.0, 200.0, 1200.0, 1000.0)


@pytest.fixture
def table(tmp_path):
    """Two photos of 1600 x 1200 pixels: one with a large object, one without an object."""
    rows = []
    for i, boxes in enumerate(([BOX], [])):
        blobs = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(blobs).resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.jpg", quality=95)
        rows.append(Row(tmp_path / f"{i}.jpg", "a", entry=BoxEntry(tuple(boxes), (1.0,) * len(boxes), ("",) * len(boxes))))
    return ImageTable(tmp_path, tuple(rows))


@pytest.fixture
def decoded(monkeypatch):
    """The number of pixels of every decoded image."""
    counts, original = [], LazyImage.pixels

    def pixels(self, scale=1):
        image = original(self, scale)
        counts.append(image.shape[0] * image.shape[1])
        return image

    monkeypatch.setattr(LazyImage, "pixels", pixels)
    return counts


def items(table, augment, decode="scaled", size=64, branches=("full", "fg"), **options):
    spec = ViewSpec(size=size, decode=decode, **options)
    return ViewDataset(table, ["a"], spec, branches, augment=augment)


@pytest.mark.parametrize(
    ("augment", "size", "scales"),
    [
        (Augment(), 64, (2, 4)),  # the box keeps 800 * 0.7 * 0.8 = 448 pixels, the crop of the image 980
        (Augment(), 32, (4, 8)),
        (Augment(), 224, (1, 2)),
        (Augment(scale=1.0, box_jitter=0.0), 64, (4, 8)),
        (Augment(scale=0.08), 64, (2, 2)),
        (Augment(box_jitter=0.5), 64, (1, 4)),  # nothing of the box is certain to stay
    ],
)
def test_no_finer_than_the_smallest_crop_needs(table, decoded, augment, size, scales):
    made = items(table, augment, size=size)
    for i, scale in enumerate(scales):
        made[i]
        assert decoded == [1600 * 1200 // scale**2]
        decoded.clear()


def test_the_views_are_those_of_the_whole_image(table):
    augment = Augment(scale=1.0, color=0.3, flip=0.5, box_jitter=0.2)
    for epoch in range(4):
        for i in range(2):
            views = []
            for decode in ("scaled", "full"):
                made = items(table, augment, decode)
                made.set_epoch(epoch)
                views.append(made[i])
            assert bool(views[0]["has_fg"]) == (i == 0)
            for branch in ("full", "fg")[: 2 - i]:
                assert float((views[0][branch] - views[1][branch]).abs().mean()) < 0.02  # of one standard deviation


@pytest.mark.parametrize(
    "options",
    [{"decode": "full"}, {"fg_mode": "masked_crop"}, {"branches": ("full", "fg", "bg")}],
)
def test_pixels_that_are_replaced_or_asked_for_are_not_reduced(table, decoded, options):
    items(table, Augment(), **options)[1]
    assert decoded == [1600 * 1200]


def test_masks_and_swapped_backgrounds_are_not_reduced(table, decoded, tmp_path):
    Image.fromarray(np.full((1200, 1600), 255, np.uint8)).save(tmp_path / "mask.png")
    masked = replace(table, rows=(replace(table.rows[0], mask_file=tmp_path / "mask.png"),))
    items(masked, Augment())[0]
    swapped = replace(table, rows=(replace(table.rows[0], background=table.rows[1]),))
    items(swapped, Augment())[0]
    assert decoded == [1600 * 1200] * 3


def test_the_object_in_the_full_view_stays_where_it_is(table):
    augment = Augment(scale=1.0, color=0.0, flip=0.0, box_jitter=0.0)
    spec = ViewSpec(size=64, decode="scaled")
    scaled, full = (
        ViewDataset(table, ["a"], s, ("full", "fg"), augment=augment, locate=True)[0]["box"]
        for s in (spec, replace(spec, decode="full"))
    )
    assert torch.allclose(scaled, full, atol=0.01)
