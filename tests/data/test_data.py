"""From a user's folder to training rows."""

import csv
import shutil

import pytest
import torch
from conftest import write_dataset
from PIL import Image

from l2r2_models import L2R2Error, ViewSpec
from l2r2_models.data.augment import Augment
from l2r2_models.data.dataset import ViewDataset, check_images, sample_of
from l2r2_models.data.demo import AT_HOME, DIGITS, PHOTOGRAPHS, make_demo_data
from l2r2_models.data.splits import hold_out
from l2r2_models.data.table import read_table


def image(path, size=(30, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)
    return path


def test_metadata_gives_labels_splits_and_boxes(dataset):
    table = read_table(dataset)
    assert table.splits == ("train", "val", "test") and len(table) == 36
    assert table.of_split("val").classes() == ("blue", "green", "red")
    row = table.rows[0]
    sample = sample_of(row, (0, 0, 0))
    x0, y0, x1, y1 = sample.box.int().tolist()
    assert len(sample.pixels[y0:y1, x0:x1].reshape(-1, 3).unique(dim=0)) == 1  # the square, exactly


def test_one_folder_a_class_with_and_without_splits(tmp_path):
    for name in ("cat/a.jpg", "cat/b.jpg", "dog/c.png"):
        image(tmp_path / "flat" / name)
        for split in ("train", "test"):
            image(tmp_path / "split" / split / name)
    flat, split = read_table(tmp_path / "flat"), read_table(tmp_path / "split")
    assert flat.splits == () and flat.label_counts() == {"cat": 2, "dog": 1}
    assert split.splits == ("test", "train") and split.of_split("train").classes() == ("cat", "dog")


def test_boxes_of_a_file_replace_those_of_the_metadata(dataset, tmp_path):
    (tmp_path / "boxes.json").write_text('{"train_000.png": [[1, 2, 30, 40]], "images/train_001.png": []}')
    table = read_table(dataset, boxes=tmp_path / "boxes.json")
    assert table.rows[0].entry.boxes == ((1, 2, 30, 40),)
    assert table.rows[1].entry.boxes == () and table.rows[2].entry is None


def test_another_metadata_file_chooses_rows_and_labels(dataset, tmp_path):
    (tmp_path / "rows.csv").write_text("file_name,label\nimages/test_003.png,yes\nimages/val_001.png,no\n")
    table = read_table(dataset, metadata=tmp_path / "rows.csv")
    assert [row.label for row in table.rows] == ["yes", "no"] and table.rows[0].entry is None


def test_unusable_data_sets_are_named(tmp_path, dataset):
    with pytest.raises(L2R2Error, match="no such folder"):
        read_table(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(L2R2Error, match="empty: no image in this folder"):
        read_table(tmp_path / "empty")
    with pytest.raises(L2R2Error, match='no image has the split "dev"; it has train, val, test'):
        read_table(dataset).of_split("dev")
    image(tmp_path / "one" / "only" / "a.png")
    with pytest.raises(L2R2Error, match='all images have the class "only"'):
        read_table(tmp_path / "one").classes()
    image(tmp_path / "loose" / "a.png")
    with pytest.raises(L2R2Error, match=r"1 of 1 images have no label, the first is a\.png"):
        read_table(tmp_path / "loose").classes()
    (dataset / "images" / "val_002.png").unlink()
    with pytest.raises(L2R2Error, match=r"lists images/val_002\.png, which is not in"):
        read_table(dataset)


def test_a_class_may_be_called_like_a_split_and_folders_below_it_belong_to_it(tmp_path):
    for name in ("train/a.png", "car/red/b.png", "car/c.png"):
        image(tmp_path / name)
    assert read_table(tmp_path).label_counts() == {"car": 2, "train": 1}
    assert read_table(tmp_path).splits == ()


def test_images_outside_of_class_folders_are_not_dropped_or_labeled_by_their_split(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "train/c.png"):
        image(tmp_path / name)
    with pytest.raises(L2R2Error, match=r"1 of 3 images have no label, the first is train/c\.png"):
        read_table(tmp_path).of_split("train").classes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.png,x,train\na.png,y,train\n", "two values of label, x and y"),
        ("a.png,x,train\n./a.png,x,test\n", "two values of split, train and test"),
    ],
)
def test_rows_that_contradict_each_other_are_refused(tmp_path, rows, message):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,label,split\n" + rows)
    with pytest.raises(L2R2Error, match=message):
        read_table(tmp_path)


def test_odd_values_in_metadata_do_no_harm(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 3, "split": 1}\n')
    assert read_table(tmp_path).of_split("1").rows[0].label == "3"
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "%s.png", "label": "x"}\n' % ("a" * 300))
    with pytest.raises(L2R2Error, match="which is not in"):
        read_table(tmp_path)


def test_bad_images_and_boxes_for_another_size_are_found_before_training(dataset):
    (dataset / "images" / "train_001.png").write_bytes(b"PK\x03\x04 zip")
    (dataset / "images" / "train_002.png").write_bytes(b"")
    table = read_table(dataset)
    check = check_images(table, lambda steps, total: steps)
    bad = check.bad
    assert len(check.with_box) == 34 and {p.name for p in bad} == {"train_001.png", "train_002.png"}
    assert "ZIP" in bad[dataset / "images" / "train_001.png"]


def test_augmentation_keeps_box_and_pixels_together():
    """The square's pixels stay under its box through crop and flip, whatever is drawn."""
    augment = Augment(scale=0.3, color=0.0, box_jitter=0.0, min_visible=1.0)
    pixels = torch.zeros(60, 80, 3, dtype=torch.uint8)
    pixels[20:30, 40:60] = 255
    mask = pixels[..., 0] > 0
    sizes = set()
    for i in range(60):
        moved, box, moved_mask = augment(pixels, torch.tensor([40.0, 20, 60, 30]), mask, seed=(0, i))
        x0, y0, x1, y1 = box.int().tolist()
        assert moved[y0:y1, x0:x1].min() == 255 and (moved > 0).sum() == 3 * 200
        assert torch.equal(moved_mask, moved[..., 0] > 0)
        sizes.add(moved.shape)
    assert len(sizes) > 10


def test_augmentation_draws_the_same_from_the_same_seed_and_leaves_global_randomness_alone():
    augment, pixels = Augment(), torch.randint(0, 255, (50, 50, 3), dtype=torch.uint8)
    box = torch.tensor([10.0, 10, 30, 30])
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    first = augment(pixels, box, None, seed=(1, 2))
    assert torch.equal(torch.rand(1), before)
    second, third = augment(pixels, box, None, seed=(1, 2)), augment(pixels, box, None, seed=(1, 3))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[0].shape != third[0].shape or not torch.equal(first[0], third[0])


def test_a_box_never_leaves_its_image_and_jitter_stays_within_bounds():
    augment = Augment(scale=0.1, box_jitter=0.0, min_visible=0.7)
    pixels = torch.zeros(40, 40, 3, dtype=torch.uint8)
    for i in range(50):
        moved, box, _ = augment(pixels, torch.tensor([0.0, 0, 8, 8]), None, seed=(i,))
        assert (box[2:] - box[:2]).prod() >= 0.7 * 64
        assert (box >= 0).all() and box[2] <= moved.shape[1] and box[3] <= moved.shape[0]
    jitter = Augment(scale=1, flip=0, box_jitter=0.1)
    boxes = torch.stack([jitter(pixels, torch.tensor([10.0, 10, 30, 20]), None, seed=(i,))[1] for i in range(200)])
    shift = (boxes - torch.tensor([10.0, 10, 30, 20])).abs()
    assert shift[:, [0, 2]].max() <= 2.0 and shift[:, [1, 3]].max() <= 1.0 and shift.mean() > 0.1


def test_no_box_stays_no_box():
    _, box, _ = Augment()(torch.zeros(40, 40, 3, dtype=torch.uint8), torch.full((4,), float("nan")), None, seed=(0,))
    assert box.isnan().all()


def test_items_hold_the_views_of_their_branches(dataset):
    table, spec = read_table(dataset).of_split("train"), ViewSpec(size=16)
    items = ViewDataset(table, table.classes(), spec, ("full", "fg"))
    item = items[1]
    assert set(item) == {"full", "fg", "has_fg", "labels"} and bool(item["has_fg"])
    color = ((item["fg"] * torch.tensor(spec.std)[:, None, None]) + torch.tensor(spec.mean)[:, None, None]) * 255
    assert (color.mean((1, 2)) - torch.tensor([30.0, 200, 30])).abs().max() < 1  # labels cycle: row 1 is green
    assert table.classes()[item["labels"]] == "green"


def test_an_item_depends_on_epoch_and_row_only(dataset):
    table = read_table(dataset).of_split("train")
    make = lambda: ViewDataset(table, table.classes(), ViewSpec(size=16), ("full", "fg"), augment=Augment(), seed=1)  # noqa: E731
    first, second = make(), make()
    first[0]
    assert torch.equal(first[3]["full"], second[3]["full"])
    second.set_epoch(1)
    assert not torch.equal(first[3]["full"], second[3]["full"])


def test_a_box_below_the_threshold_is_no_box(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,label,x0,y0,x1,y1,score\na.png,x,1,1,9,9,0.1\n")
    row = read_table(tmp_path).rows[0]
    assert sample_of(row, (0, 0, 0), box_threshold=0.2).box.isnan().all()
    assert sample_of(row, (0, 0, 0), box_threshold=0.05).box.tolist() == [1, 1, 9, 9]


def test_a_mask_alone_gives_the_box(tmp_path):
    image(tmp_path / "a.png")
    mask = Image.new("L", (30, 20))
    mask.paste(255, (4, 5, 9, 12))
    mask.save(tmp_path / "m.png")
    (tmp_path / "metadata.csv").write_text("file_name,label,mask_file\na.png,x,m.png\n")
    sample = sample_of(read_table(tmp_path).rows[0], (0, 0, 0))
    assert sample.box.tolist() == [4, 5, 9, 12] and int(sample.mask.sum()) == 5 * 7


def test_rows_are_held_out_by_class_and_whole_groups(tmp_path):
    lines = ["file_name,label,site"]
    for i in range(60):
        image(tmp_path / f"{i}.png", (4, 4))
        lines.append(f"{i}.png,{'ab'[i % 2]},site{i // 6}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    table = read_table(tmp_path)
    stay, val = hold_out(table, 0.2, seed=1)
    assert val.label_counts() == {"a": 6, "b": 6} and not set(stay.names()) & set(val.names()) and len(stay) + len(val) == 60
    assert hold_out(table, 0.2, seed=1)[1].names() == val.names() != hold_out(table, 0.2, seed=2)[1].names()
    stay, val = hold_out(table, 0.2, group="site")
    assert not set(stay.column("site")) & set(val.column("site")) and len(val) == 12
    with pytest.raises(L2R2Error, match='no column "camera"'):
        hold_out(table, 0.2, group="camera")
    with pytest.raises(L2R2Error, match="cannot be held out"):
        hold_out(table.of_names(["0.png", "1.png", "2.png"]), 0.2)


def test_demo_data_ties_classes_to_backgrounds_in_training_and_unties_them_in_the_test(tmp_path):
    make_demo_data(tmp_path, train=120, test=60)
    rows = list(csv.DictReader((tmp_path / "metadata.csv").read_text().splitlines()))

    def at_home(split):
        chosen = [r for r in rows if r["split"] == split]
        return sum(PHOTOGRAPHS[DIGITS.index(r["label"])] == r["background"] for r in chosen) / len(chosen)

    assert at_home("train") > AT_HOME - 0.06 and at_home("test_usual") > AT_HOME - 0.1 and at_home("test_swapped") == 0
    table = read_table(tmp_path)
    assert all(0 <= v <= 96 for row in table.rows for v in row.entry.boxes[0])
    again = make_demo_data(tmp_path / "again", train=120, test=60)
    name = "images/train_0005.png"
    assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    shutil.rmtree(again)


def test_a_class_that_was_not_trained_is_refused(tmp_path, dataset):
    table = read_table(dataset)
    with pytest.raises(L2R2Error, match="label red does not occur in training"):
        ViewDataset(table, ("blue", "green"), ViewSpec(size=16), ("full",))


def test_rows_keep_their_other_columns(tmp_path):
    data = write_dataset(tmp_path / "d", count=3)
    assert dict(read_table(data).rows[0].columns)["split"] == "train"
