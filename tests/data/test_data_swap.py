"""Objects on the backgrounds of other images: as augmentation, and as rows to fit fusions on."""

from dataclasses import replace

import pytest
import torch
from conftest import COLORS, write_dataset
from PIL import Image

from l2r2_models import L2R2Error, ViewSpec
from l2r2_models.boxes import BoxEntry
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.data.dataset import ViewDataset, sample_of
from l2r2_models.data.swap import swapped
from l2r2_models.data.table import read_table, rows_digest
from l2r2_models.evaluate.logits import branch_logits


def rectangle(box):
    x0, y0, x1, y1 = (int(v) for v in box)
    return slice(y0, y1), slice(x0, x1)


def levels_of(pixels):
    return {tuple(c) for c in pixels.reshape(-1, 3).tolist()}


def split(dataset, name):
    return read_table(dataset).of_split(name)


def test_an_object_lies_at_its_own_place_on_the_other_images_background_and_no_other_object_is_seen(dataset):
    table = split(dataset, "train")
    for row, other in zip(table.rows, (*table.rows[1:], table.rows[0])):  # neighbors have different colors
        plain, donor = sample_of(row, (0, 0, 0)), sample_of(other, (0, 0, 0))
        mixed = sample_of(replace(row, background=other), (0, 0, 0))
        assert torch.equal(mixed.box, plain.box)
        where = rectangle(plain.box)
        assert torch.equal(mixed.pixels[where], plain.pixels[where])
        assert tuple(COLORS[other.label]) not in levels_of(mixed.pixels)
        outside = torch.ones(mixed.pixels.shape[:2], dtype=torch.bool)
        for box in (plain.box, donor.box):
            outside[rectangle((box + torch.tensor([-3, -3, 3, 3])).clamp(min=0))] = False
        assert torch.equal(mixed.pixels[outside], donor.pixels[outside])


def test_rows_without_an_object_stay_as_they_are_and_so_do_those_whose_donor_may_show_one(dataset, tmp_path):
    table = split(dataset, "train")
    bare, not_found = (replace(table.rows[0], entry=entry) for entry in (None, BoxEntry()))
    for row, other in ((bare, table.rows[1]), (table.rows[1], not_found)):
        assert torch.equal(sample_of(replace(row, background=other), (0, 0, 0)).pixels, sample_of(row, (0, 0, 0)).pixels)


def test_an_image_without_boxes_is_a_background_as_a_whole_where_that_is_said(dataset, tmp_path):
    table = split(dataset, "train")
    empty = replace(table, rows=tuple(replace(row, entry=None) for row in table.rows))
    with pytest.raises(L2R2Error, match="only 0 images have one"):
        swapped(table, empty, classes="any")
    row = swapped(table, empty, classes="any", whole=True).rows[0]
    mixed, donor = sample_of(row, (0, 0, 0)), sample_of(row.background, (0, 0, 0))
    assert row.background.path != row.path and not torch.equal(mixed.pixels, donor.pixels)
    outside = torch.ones(mixed.pixels.shape[:2], dtype=torch.bool)
    outside[rectangle((mixed.box + torch.tensor([-3, -3, 3, 3])).clamp(min=0))] = False
    assert torch.equal(mixed.pixels[outside], donor.pixels[outside])


def test_a_mask_takes_only_the_object_along(dataset, tmp_path):
    table = split(dataset, "train")
    plain = sample_of(table.rows[0], (0, 0, 0))
    x0, y0, x1, y1 = plain.box.int().tolist()
    mask = torch.zeros(plain.pixels.shape[:2], dtype=torch.uint8)
    mask[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = 255
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    row = replace(table.rows[0], mask_file=tmp_path / "mask.png", background=table.rows[1])
    mixed = sample_of(row, (0, 0, 0))
    same = (mixed.pixels == torch.tensor(COLORS[row.label], dtype=torch.uint8)).all(-1)
    assert same.any() and not same[mask == 0].any()


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_training_items_are_swapped_with_the_requested_probability_and_the_same_in_any_worker(dataset, probability):
    table = split(dataset, "train")
    make = lambda p: ViewDataset(table, table.classes(), ViewSpec(size=32), ("full", "fg"), background_swap=p)  # noqa: E731
    items, again, plain = make(probability), make(probability), make(0.0)
    changed = []
    for epoch in range(10):
        for data in (items, again, plain):
            data.set_epoch(epoch)
        for i in range(len(table)):
            item = items[i]
            changed.append(not torch.equal(item["full"], plain[i]["full"]))
            assert bool(item["has_fg"]) and (i % 5 or torch.equal(item["full"], again[i]["full"]))
    assert abs(sum(changed) / len(changed) - probability) < 0.12
    backgrounds = set()
    for epoch in range(8):
        items.set_epoch(epoch)
        backgrounds.add(items[0]["full"].sum().item())
    assert (len(backgrounds) > 3) == (probability == 1.0) or probability == 0.4


def test_a_swap_needs_two_images_with_an_object(dataset):
    table = split(dataset, "train")
    rows = tuple(replace(row, entry=row.entry if i == 0 else None) for i, row in enumerate(table.rows))
    with pytest.raises(L2R2Error, match="needs at least two images"):
        ViewDataset(replace(table, rows=rows), table.classes(), ViewSpec(size=16), ("full",), background_swap=0.5)


@pytest.mark.parametrize("classes", ["other", "same", "any"])
def test_a_swapped_split_takes_backgrounds_from_the_donors_only(dataset, classes):
    val, train = split(dataset, "val"), split(dataset, "train")
    made = swapped(val, train, copies=3, classes=classes)
    assert made.names() == [name for name in val.names() for _ in range(3)]
    assert {row.background.path for row in made.rows} <= {row.path for row in train.rows}
    same = [row.background.label == row.label for row in made.rows]
    assert {"other": not any(same), "same": all(same), "any": any(same) and not all(same)}[classes]
    for i in range(0, len(made), 3):
        assert len({row.background.path for row in made.rows[i : i + 3]}) == 3
    assert made == swapped(val, train, copies=3, classes=classes) != swapped(val, train, copies=3, classes=classes, seed=1)


def test_an_image_is_never_its_own_background(dataset):
    val = split(dataset, "val")
    made = swapped(val, val, copies=3, classes="same")  # each class has four images
    assert all(row.background.path != row.path for row in made.rows)
    with pytest.raises(L2R2Error, match=r"val_000\.png needs 4 backgrounds of the class red, but only 3 images have one"):
        swapped(val, val, copies=4, classes="same")


def test_rows_without_an_object_are_left_out_of_a_swapped_split(dataset):
    val, train = split(dataset, "val"), split(dataset, "train")
    some = replace(val, rows=tuple(replace(row, entry=None) if i % 2 else row for i, row in enumerate(val.rows)))
    assert len(swapped(some, train)) == len(val) / 2
    with pytest.raises(L2R2Error, match="no image has a box or mask"):
        swapped(replace(val, rows=tuple(replace(row, entry=None) for row in val.rows)), train)
    with pytest.raises(L2R2Error, match="another class, but only 0 images have one"):
        swapped(val, replace(train, rows=tuple(replace(row, entry=None) for row in train.rows)))
    with pytest.raises(L2R2Error, match='backgrounds "others"'):
        swapped(val, train, classes="others")


def test_the_logits_of_a_swapped_split_are_computed_stored_and_told_from_the_plain_ones(dataset, run, tmp_path):
    val, train = split(dataset, "val"), split(dataset, "train")
    made, checkpoint = swapped(val, train, copies=2), hub.load_checkpoint(run)
    plain, moved = (branch_logits(checkpoint, table, tmp_path / "store") for table in (val, made))
    assert len(moved) == 2 * len(plain) and moved.has_fg.all()
    assert not torch.allclose(moved.logits["full"][::2], plain.logits["full"], atol=1e-3)
    # the crop to the box is what it was: only what lies around it is new
    assert torch.allclose(moved.logits["fg"][::2], plain.logits["fg"], atol=1e-5)
    assert len(list((tmp_path / "store").iterdir())) == 2
    again = branch_logits(checkpoint, made, tmp_path / "store")
    assert torch.equal(again.logits["full"], moved.logits["full"])
    assert len({rows_digest(t) for t in (val, made, swapped(val, train, copies=2, seed=1))}) == 3


def test_a_changed_background_image_gives_another_digest(tmp_path):
    data = write_dataset(tmp_path / "d", splits=("train", "val"))
    made = swapped(split(data, "val"), split(data, "train"))
    before = rows_digest(made, times=True)
    made.rows[0].background.path.touch()
    assert rows_digest(made, times=True) != before and rows_digest(made) == rows_digest(made)


def test_all_objects_of_a_donor_are_gone_whichever_row_it_is(dataset):
    """An image with two objects in two rows, of two classes: on its background neither of them may be seen."""
    train = split(dataset, "train")
    first, second = train.rows[:2]
    pixels = sample_of(first, (0, 0, 0)).pixels
    pixels[:, :12] = torch.tensor(COLORS[second.label], dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(first.path)
    own = sample_of(first, (0, 0, 0)).box[0].item()
    assert own > 16, "the object that was there must stay visible"
    other = replace(second, path=first.path, entry=replace(second.entry, boxes=((0.0, 0.0, 12.0, 40.0),)))
    donors = replace(train, rows=(first, other))
    third = next(row for row in train.rows if row.label not in (first.label, second.label))
    for classes in ("other", "any"):
        (row,) = swapped(replace(train, rows=(third,)), donors, classes=classes).rows
        mixed = levels_of(sample_of(row, (0, 0, 0)).pixels)
        assert tuple(COLORS[third.label]) in mixed
        assert not mixed & {tuple(COLORS[first.label]), tuple(COLORS[second.label])}
    with pytest.raises(L2R2Error, match="needs 2 backgrounds of any class, but only 1 images"):
        swapped(replace(train, rows=(third,)), donors, classes="any", copies=2)
    items = ViewDataset(
        replace(train, rows=(third, first, other)), train.classes(), ViewSpec(size=40), ("full",), background_swap=1.0
    )
    assert [len(row.entry.boxes) for row in items.donors] == [1, 2]
