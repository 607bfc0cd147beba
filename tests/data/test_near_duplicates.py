"""Near-duplicates across splits, and held-out blocks that avoid them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from l2r2_models import L2R2Error
from l2r2_models.data.dataset import check_images
from l2r2_models.data.near_duplicates import ALIKE, HELD_OUT, MAX_COMPARED, find_leaks, perceptual_hash
from l2r2_models.data.splits import hold_out
from l2r2_models.data.table import ImageTable, Row, read_table

FOD = Path(__file__).parents[3] / "shared" / "data" / "fod_a_shift"


def scene(seed, side=120):
    """Smooth random structure, different for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def bits_apart(first, second):
    a, b = (np.unpackbits(np.frombuffer(perceptual_hash(image), dtype=np.uint8)) for image in (first, second))
    return int((a != b).sum())


def table_of(folder, images, labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, image in enumerate(images):
        path = folder / f"{i:03d}.png"
        image.save(path)
        rows.append(Row(path, labels[i] if labels else "x"))
    return ImageTable(folder.parent, tuple(rows))


@pytest.mark.parametrize(
    "change",
    [
        lambda im: im.resize((77, 77), Image.Resampling.BILINEAR),
        lambda im: im.point(lambda v: 0.8 * v + 20),
        lambda im: im.filter(ImageFilter.GaussianBlur(1)),
        lambda im: im.crop((1, 1, 120, 120)),
        lambda im: im.convert("L").convert("RGB"),
    ],
    ids=["smaller", "paler", "blurred", "shifted", "gray"],
)
def test_a_copy_that_was_changed_a_little_is_alike_and_another_image_is_not(change):
    assert all(bits_apart(scene(i), change(scene(i))) <= ALIKE for i in range(8))
    assert all(bits_apart(scene(i), change(scene(i + 1))) > ALIKE + 20 for i in range(8))


def test_the_distance_is_the_number_of_bits_that_differ_and_the_nearest_pair_is_named(tmp_path):
    train = table_of(tmp_path / "train", [scene(i) for i in range(6)])
    val = table_of(tmp_path / "val", [scene(20), scene(3).filter(ImageFilter.GaussianBlur(5)), scene(4)])
    (leak,) = find_leaks(train, {"val": val})
    assert (leak.split, leak.images, leak.alike) == ("val", 3, 2) and leak.example == ("val/002.png", "train/004.png")
    assert "2 of 3 val images" in leak.sentence() and "into the same split" in leak.sentence()
    (leak,) = find_leaks(train, {HELD_OUT: val})
    assert all(words in leak.sentence() for words in ("2 of 3 held-out images", "--val-group", "--val-from end"))
    assert "--val-group" in leak.sentence(take="end") and "--val-from" not in leak.sentence(take="end")
    assert "different values of site" in leak.sentence("site") and "--val" not in leak.sentence("site")  # not what was given
    assert find_leaks(train, {"test": table_of(tmp_path / "test", [scene(20)])}) == []
    assert find_leaks(train, {}) == []


def test_near_duplicates_of_another_class_do_not_count_and_unlabeled_ones_do(tmp_path):
    train = table_of(tmp_path / "train", [scene(i) for i in range(4)], ["a", "b", "a", "b"])
    same, other, nameless = (table_of(tmp_path / "v", [scene(0)], [label]) for label in ("a", "b", None))
    assert [len(find_leaks(train, {"v": t})) for t in (same, other, nameless)] == [1, 0, 1]


def test_hashes_of_the_check_are_used_and_bad_images_do_no_harm(dataset):
    table = read_table(dataset)
    (dataset / "images" / "test_000.png").write_bytes(b"no image")
    train, val, test = (table.of_split(name) for name in table.splits)
    check = check_images(replace(table, rows=train.rows + val.rows), lambda steps, _: steps)
    for row in train.rows:
        row.path.unlink()  # nothing is decoded twice
    copies = replace(val, rows=tuple(replace(val.rows[0], path=row.path, label=row.label) for row in train.rows))
    found = find_leaks(train, {"val": copies, "test": test}, check.hashes)
    assert [(leak.split, leak.alike) for leak in found] == [("val", len(train))]


def test_of_a_large_split_evenly_spaced_images_are_compared(tmp_path):
    train = table_of(tmp_path / "train", [scene(0)])
    digest = perceptual_hash(scene(0))
    rows = tuple(Row(tmp_path / f"{i}.png", "x") for i in range(3 * MAX_COMPARED))
    (leak,) = find_leaks(train, {"test": replace(train, rows=rows)}, {row.path: digest for row in rows})
    assert leak.images == leak.alike == MAX_COMPARED


def test_the_end_of_each_class_is_held_out_as_one_block(dataset):
    table = read_table(dataset).of_split("train")  # red, green, blue, red, ...: four each
    stay, val = hold_out(table, 0.25, take="end")
    assert val.names() == table.names()[-3:] and set(val.names()).isdisjoint(stay.names())
    assert hold_out(table, 0.01, take="end")[1].names() == table.names()[-3:]  # one of each class at least
    assert hold_out(table, 0.25, take="end", seed=5)[1] == val
    with pytest.raises(L2R2Error, match='"start"; choose from random, end'):
        hold_out(table, 0.2, take="start")
    with pytest.raises(L2R2Error, match="use one or the other"):
        hold_out(table, 0.2, take="end", group="label")
    alone = replace(table, rows=(*table.rows, replace(table.rows[0], path=table.rows[0].path.with_name("z.png"), label="gray")))
    with pytest.raises(L2R2Error, match="holding 20 % out would leave no training image of gray"):
        hold_out(alone, 0.2, take="end")


@pytest.mark.parametrize("take", ["random", "end"])
def test_objects_of_one_image_are_held_out_together(dataset, take):
    table = read_table(dataset).of_split("train")
    twice = replace(table, rows=tuple(replace(row, label=label) for row in table.rows for label in ("a", "b")))
    stay, val = hold_out(twice, 0.25, take=take)
    assert {r.path for r in stay.rows}.isdisjoint(r.path for r in val.rows) and len(val) == 6 and val.classes() == ("a", "b")


@pytest.mark.skipif(not FOD.exists(), reason="needs the real images of fod_a_shift")
def test_neighboring_frames_are_found_and_another_recording_of_the_same_ground_is_not():
    table = read_table(FOD)
    train, near, far = (table.of_split(name) for name in ("train", "test_id", "test_ood"))
    some = replace(far, rows=far.rows[::6])
    found = {leak.split: leak for leak in find_leaks(train, {"test_id": near, "test_ood": some})}
    assert 20 <= found["test_id"].alike <= 80 and "test_ood" not in found


def test_groups_that_share_an_image_are_held_out_together():
    """Two objects an image, each with its own name: neither the image nor either of the objects may lie on both sides."""
    rows = [
        Row(Path(f"{i}.png"), "ab"[k], columns=(("object", f"{'ab'[k]}{i % 10 if k else i // 4}"),))
        for i in range(40)
        for k in (0, 1)
        if k == 0 or i % 8 == 0
    ]
    stay, val = hold_out(ImageTable(Path(), tuple(rows)), 0.25, group="object")
    assert len(val) and not set(stay.names()) & set(val.names())
    assert not set(stay.column("object")) & set(val.column("object"))


def test_training_images_that_cannot_be_read_leave_nothing_to_compare_with(tmp_path):
    val = table_of(tmp_path / "val", [scene(1)])
    assert find_leaks(replace(val, rows=(Row(tmp_path / "gone.png", "x"),)), {"val": val}) == []
