"""Data sets of `datasets`, several objects per image, and a metadata file in each split."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_dataset
from PIL import Image

from l2r2_cli.commands import main
from l2r2_models import L2R2Error
from l2r2_models.data.dataset import sample_of
from l2r2_models.data.table import read_table
from l2r2_models.predict.inputs import gather

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache" / "l2r2"


def encoded(seed, format="PNG", size=(30, 20)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def made(count=6, image="image", label="label", seed=0, **more):
    """A data set with encoded images, labeled in turn."""
    features = {
        image: datasets.Image(),
        label: datasets.ClassLabel(names=["cat", "dog"]),
        "site": datasets.Value("string"),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "score": datasets.List(datasets.Value("float32")),
        },
    }
    rows = {
        image: [{"bytes": encoded(seed + i), "path": f"photo_{i}.png"} for i in range(count)],
        label: [i % 2 for i in range(count)],
        "site": [f"s{i // 2}" for i in range(count)],
        "objects": [{"bbox": [[1.0, 2.0, 5.0, 6.0]] if i else [], "score": [0.5] if i else []} for i in range(count)],
    }
    features.update({name: kind for name, (kind, _) in more.items()})
    rows.update({name: values for name, (_, values) in more.items()})
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_a_saved_data_set_has_its_splits_labels_boxes_columns_and_the_very_bytes_of_its_images(tmp_path, cache):
    datasets.DatasetDict({"train": made(), "test": made(4, seed=50)}).save_to_disk(tmp_path / "saved")
    table = read_table(tmp_path / "saved")
    assert table.splits == ("train", "test") and table.label_counts() == {"cat": 5, "dog": 5}
    row = table.of_split("test").rows[2]
    assert row.path.read_bytes() == encoded(52) and row.path.name == "photo_2.png"
    assert row.entry.boxes == ((1, 2, 6, 8),) and row.entry.scores == (0.5,) and row.label == "cat"
    assert table.of_split("train").column("site") == ["s0", "s0", "s1", "s1", "s2", "s2"]
    assert table.rows[0].entry.boxes == () and table.root.parent == cache


def test_a_second_call_reads_what_is_there_and_a_changed_data_set_gets_another_folder(tmp_path, cache):
    made().save_to_disk(tmp_path / "saved")
    first = read_table(tmp_path / "saved")
    times = {row.path: row.path.stat().st_mtime_ns for row in first.rows}
    again = read_table(tmp_path / "saved")
    assert again == first and {row.path: row.path.stat().st_mtime_ns for row in again.rows} == times
    made(seed=9).save_to_disk(tmp_path / "other")
    assert read_table(tmp_path / "other").root != first.root and len(list(cache.iterdir())) == 2


def test_an_interrupted_export_is_continued(tmp_path):
    made().save_to_disk(tmp_path / "saved")
    first = read_table(tmp_path / "saved")
    (first.root / "metadata.jsonl").unlink()
    first.rows[1].path.unlink()
    first.rows[2].path.write_bytes(b"half")
    kept = first.rows[0].path.stat().st_mtime_ns
    assert read_table(tmp_path / "saved") == first and first.rows[0].path.stat().st_mtime_ns == kept
    assert [row.path.read_bytes() for row in first.rows] == [encoded(i) for i in range(6)]


def test_a_local_folder_of_parquet_can_be_an_id(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        made(4).to_parquet(tmp_path / "folder" / f"{split}-00000.parquet")
    table = read_table(f"hf:{tmp_path / 'folder'}")
    assert table.splits == ("train", "validation") and table.label_counts() == {"cat": 4, "dog": 4}
    assert table.rows[5].path.read_bytes() == encoded(1) and table.rows[5].entry.scores == (0.5,)


def test_columns_that_cannot_be_told_are_asked_for_and_named_in_the_id(tmp_path):
    more = {"depth": (datasets.Image(), [{"bytes": encoded(i + 90), "path": None} for i in range(6)])}
    made(image="photo", label="species", **more).save_to_disk(tmp_path / "two")
    with pytest.raises(L2R2Error, match=r"several image columns, photo, depth; name the one to use as hf:ID\?image=COLUMN"):
        read_table(tmp_path / "two")
    table = read_table(f"hf:{tmp_path / 'two'}?image=depth&label=site")
    assert table.classes() == ("s0", "s1", "s2") and table.rows[3].path.read_bytes() == encoded(93)
    assert table.column("species") == ["cat", "dog"] * 3
    for query, message in (
        ("image=rgb", 'no column "rgb"; choose from photo, species'),
        ("colum=x", 'unknown option "colum"; choose'),
    ):
        with pytest.raises(L2R2Error, match=message):
            read_table(f"hf:{tmp_path / 'two'}?{query}")
    made().remove_columns("image").save_to_disk(tmp_path / "none")
    with pytest.raises(L2R2Error, match="no image column"):
        read_table(tmp_path / "none")


def test_hidden_labels_missing_images_equal_names_and_odd_ones(tmp_path):
    data = made(5).to_dict()
    features = made(1).features
    data["label"] = [0, 1, -1, None, 1]
    names = ["a/x.png", "b/x.png", "../../evil name.png", None, "y"]
    data["image"] = [{"bytes": encoded(i, "JPEG"), "path": name} for i, name in enumerate(names)]
    data["image"][4] = None
    datasets.Dataset.from_dict(data, features=features).save_to_disk(tmp_path / "saved")
    table = read_table(tmp_path / "saved")
    assert [row.label for row in table.rows] == ["cat", "dog", None, None, "dog"]
    assert table.names() == [
        "images/x.png",
        "images/0000001_x.png",
        "images/evil_name.png",
        "images/0000003.jpeg",
        "images/0000004.img",
    ]
    assert [row.path.read_bytes() for row in table.rows] == [*(encoded(i, "JPEG") for i in range(4)), b""]
    with pytest.raises(L2R2Error, match=r"0000004\.img: is empty"):
        sample_of(table.rows[4], (0, 0, 0))


def test_masks_and_labeled_objects_come_along(tmp_path):
    white = io.BytesIO()
    Image.new("L", (30, 20), 255).save(white, "PNG")
    names = datasets.ClassLabel(names=["bird", "cow"])
    rows = {
        "image": [{"bytes": encoded(0), "path": None}],
        "mask": [{"bytes": white.getvalue(), "path": None}],
        "objects": [[{"bbox": [1.0, 1.0, 4.0, 4.0], "category": 0}, {"bbox": [9.0, 9.0, 4.0, 4.0], "category": 1}]],
    }
    features = datasets.Features(
        image=datasets.Image(),
        mask=datasets.Image(),
        objects=datasets.List({"bbox": datasets.List(datasets.Value("float32")), "category": names}),
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    table = read_table(tmp_path / "saved")
    assert [(row.label, row.entry.boxes) for row in table.rows] == [("bird", ((1, 1, 5, 5),)), ("cow", ((9, 9, 13, 13),))]
    assert sample_of(table.rows[0], (0, 0, 0)).mask.all()


@pytest.mark.parametrize("name", ["hf:nobody/nothing-of-that-name", "hf:no/such/folder/at-all"])
def test_an_id_that_is_not_there_is_one_sentence(name):
    with pytest.raises(L2R2Error, match=r"cannot be loaded \(.*\); an id is org/name, and the first call needs network access"):
        read_table(name)


def test_a_damaged_saved_data_set_and_a_forgotten_prefix_are_named(tmp_path, monkeypatch, capsys):
    made().save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"gone")
    with pytest.raises(L2R2Error, match="saved: cannot be loaded"):
        read_table(tmp_path / "saved")
    monkeypatch.setattr("sys.argv", ["l2r2", "finetune", "org/name", "--model", "timm:resnet10t", "-o", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (
        ended.value.code == 1
        and "org/name: no such folder; for a data set on the Hub, use hf:ORG/NAME" in capsys.readouterr().err
    )


def test_metadata_may_lie_beside_each_split(tmp_path):
    for split in ("train", "test"):
        write_dataset(tmp_path / split, count=3, splits=("x",))
        (tmp_path / split / "metadata.csv").write_text((tmp_path / split / "metadata.csv").read_text().replace(",x,", ",,"))
    table = read_table(tmp_path)
    assert table.splits == ("test", "train") and len(table.of_split("train").classes()) == 3
    assert table.names()[0] == "test/images/x_000.png" and all(len(row.entry.boxes) == 1 for row in table.rows)


def three_objects(folder: Path, labels=("cat", "dog", "cat")) -> Path:
    folder.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "a.png")
    lines = [f"a.png,{label},{10 * i},5,{10 * i + 8},20" for i, label in enumerate(labels)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label,x0,y0,x1,y1", *lines]) + "\n")
    return folder


def test_an_image_with_objects_of_several_classes_is_one_row_an_object(tmp_path):
    table = read_table(three_objects(tmp_path / "d"))
    assert [(row.label, row.entry.boxes[0][0]) for row in table.rows] == [("cat", 0), ("dog", 10), ("cat", 20)]
    same = read_table(three_objects(tmp_path / "e", ("cat",) * 3))
    assert len(same) == 1 and len(same.rows[0].entry.boxes) == 3


def test_the_boxes_of_an_image_are_put_together_again_for_prediction(tmp_path):
    data = three_objects(tmp_path / "d")
    Image.new("RGB", (60, 40)).save(data / "alone.png")
    with open(data / "metadata.csv", "a") as file:
        file.write("alone.png,dog,1,2,3,4\n")
    inputs = gather([data])
    assert [path.name for path in inputs.paths] == ["a.png", "alone.png"]
    boxes = {Path(path).name: [box[0] for box in entry.boxes] for path, entry in inputs.entries.items()}
    assert boxes == {"a.png": [0, 10, 20], "alone.png": [1]}


def test_a_data_set_of_the_hub_can_be_predicted(tmp_path):
    made(3).save_to_disk(tmp_path / "saved")
    inputs = gather([tmp_path / "saved"])
    assert [path.name for path in inputs.paths] == ["photo_0.png", "photo_1.png", "photo_2.png"]
    assert [len(entry.boxes) for entry in inputs.entries.values()] == [0, 1, 1]


def test_one_of_the_boxes_is_drawn_in_training_and_the_best_is_taken_else(tmp_path):
    import random

    row = read_table(three_objects(tmp_path / "d", ("cat",) * 3)).rows[0]
    assert sample_of(row, (0, 0, 0)).box.tolist() == [0, 5, 8, 20]
    drawn = [sample_of(row, (0, 0, 0), draw=random.Random(i)).box[0].item() for i in range(60)]
    assert {0, 10, 20} == set(drawn) and min(drawn.count(x) for x in (0, 10, 20)) > 8
    assert sample_of(row, (0, 0, 0), draw=random.Random(3)).box[0] == drawn[3]


@pytest.mark.parametrize(
    "lines", ["a.png,cat,1,1,9,9\na.png,dog,,,,\n", "a.png,cat,,,,\na.png,dog,,,,\n"], ids=["one has no box", "no boxes"]
)
def test_two_labels_without_a_box_each_stay_an_error(tmp_path, lines):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,label,x0,y0,x1,y1\n" + lines)
    with pytest.raises(L2R2Error, match=r"a\.png has two values of label, cat and dog"):
        read_table(tmp_path)


def coco(file: Path, names, score=None) -> Path:
    categories = [{"id": i, "name": n} for i, n in enumerate(dict.fromkeys(names))]
    ids = {c["name"]: c["id"] for c in categories}
    boxes = [{"image_id": 7, "category_id": ids[n], "bbox": [10 * i, 5, 8, 15]} for i, n in enumerate(names)]
    boxes = [{**box, **({} if score is None else {"score": score})} for box in boxes]
    file.write_text(json.dumps({"images": [{"id": 7, "file_name": "a.png"}], "annotations": boxes, "categories": categories}))
    return file


def test_annotated_boxes_give_unlabeled_images_their_labels(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "a.png")
    table = read_table(folder, boxes=coco(tmp_path / "boxes.json", ["cat", "dog", "cat"]))
    assert [(row.label, row.entry.boxes) for row in table.rows] == [
        ("cat", ((0, 5, 8, 20),)),
        ("dog", ((10, 5, 18, 20),)),
        ("cat", ((20, 5, 28, 20),)),
    ]


def test_of_annotated_boxes_only_those_of_the_images_class_are_used_and_a_localizers_labels_choose_none(tmp_path):
    for name in ("dog/a.png", "cat/b.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(tmp_path / "d" / name)
    names = ["cat", "dog", "animal"]
    table = read_table(tmp_path / "d", boxes=coco(tmp_path / "given.json", names))
    assert {row.label: row.entry.boxes if row.entry else None for row in table.rows} == {"dog": ((10, 5, 18, 20),), "cat": None}
    found = read_table(tmp_path / "d", boxes=coco(tmp_path / "found.json", names, score=0.9))
    assert [len(row.entry.boxes) for row in found.rows if row.entry] == [3]
    animals = read_table(tmp_path / "d", boxes=coco(tmp_path / "animals.json", ["animal"] * 3))
    assert [len(row.entry.boxes) for row in animals.rows if row.entry] == [3]


def test_a_box_file_that_cannot_tell_the_objects_of_an_image_apart_is_refused(tmp_path):
    data = three_objects(tmp_path / "d")
    (tmp_path / "boxes.json").write_text('{"a.png": [[1, 1, 20, 20]]}')
    with pytest.raises(L2R2Error, match=r"boxes\.json: a\.png has several labels, but not a box for each"):
        read_table(data, boxes=tmp_path / "boxes.json")
    named = read_table(data, boxes=coco(tmp_path / "named.json", ["cat", "dog"]))
    assert [(row.label, row.entry.boxes[0][0]) for row in named.rows] == [("cat", 0), ("dog", 10)]


def test_columns_that_only_sound_like_labels_or_boxes_are_not_taken_for_them(tmp_path):
    texts = datasets.Value("string")
    for i, (kind, value) in enumerate([(datasets.List(texts), ["cup"]), (texts, "cup"), ({"name": texts}, {"name": "cup"})]):
        made(objects=(kind, [value] * 6), labels=(datasets.List(texts), [["a", "b"]] * 6)).save_to_disk(tmp_path / f"{i}")
        table = read_table(tmp_path / f"{i}")
        assert table.label_counts() == {"cat": 3, "dog": 3} and not table.entries()
    made(label="species", labels=(datasets.List(texts), [["a", "b"]] * 6)).save_to_disk(tmp_path / "named")
    assert read_table(tmp_path / "named").label_counts() == {"cat": 3, "dog": 3}
    with pytest.raises(L2R2Error, match='the column "labels" does not have one label per image'):
        read_table(f"hf:{tmp_path / 'named'}?label=labels")
