"""Box files: every format read and written, joined by path, and refused in one sentence where it is malformed."""

import copy
import json
import random

import pytest
import torch

from l2r2_models.box_files import BoxEntry, BoxTable, read_boxes, read_rows, write_boxes
from l2r2_models.errors import L2R2Error

MEGADETECTOR = {
    "info": {"format_version": "1.6", "detector": "md_v5a.0.0"},
    "detection_categories": {"1": "animal", "2": "person"},
    "images": [
        {"file": "a/1.jpg", "detections": [{"category": "1", "conf": 0.9, "bbox": [0.25, 0.5, 0.5, 0.25]},
                                           {"category": "2", "conf": 0.95, "bbox": [0, 0, 1, 1]}]},
        {"file": "a/2.jpg", "detections": []},
        {"file": "a/3.jpg", "failure": "Image access failure"},
        {"file": "a/4.jpg", "width": 400, "height": 200, "detections": []},
        {"file": "a/5.jpg", "detections": None, "failure": "Failure inference"},
    ],
}  # fmt: skip
SPECIESNET = {
    "predictions": [
        {"filepath": "s/1.jpg", "prediction": "x;y", "prediction_score": 0.7, "model_version": "4.0.0a",
         "detections": [{"category": "1", "label": "animal", "conf": 0.8, "bbox": [0.25, 0.5, 0.5, 0.25]},
                        {"category": "2", "label": "human", "conf": 0.1, "bbox": [0, 0, 0.1, 0.1]}]},
        {"filepath": "s/2.jpg", "failures": ["DETECTOR", "CLASSIFIER"]},
        {"filepath": "s/3.jpg", "failures": ["GEOLOCATION"], "detections": [{"label": "cat", "conf": 1, "bbox": [0, 0, 1, 1]}]},
        {"filepath": "s/4.jpg", "detections": []},
    ]
}  # fmt: skip
COCO = {
    "info": {}, "licenses": [],
    "images": [{"id": 7, "file_name": "c/1.jpg", "width": 400, "height": 200}, {"id": "x", "file_name": "c/2.jpg"}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [100, 100, 200, 50], "area": 10000, "iscrowd": 0},
                    {"id": 2, "image_id": 7, "category_id": 9, "bbox": [0.5, 0, 10, 10.25], "score": 0.25}],
    "categories": [{"id": 3, "name": "cat"}],
}  # fmt: skip
PLAIN = {"p/1.jpg": [[100, 100, 300, 150], [0, 0.5, 10, 10]], "p/2.jpg": []}
ROWS = [
    {"file_name": "m/1.jpg", "label": "a", "x0": 100, "y0": 100, "x1": 300, "y1": 150, "score": 0.5},
    {"file_name": "m/1.jpg", "label": "a", "x0": 1.5, "y0": 2, "x1": 3, "y1": 4, "score": None},
    {"file_name": "m/2.jpg", "label": "b", "x0": None, "y0": None, "x1": None, "y1": None},
    {"file_name": "m/3.jpg", "objects": {"bbox": [[100, 100, 200, 50]], "score": [0.75]}},
    {"file_name": "m/4.jpg", "objects": {"bbox": [[100, 100, 200, 50], [1, 2, 3, 4]]}},
    {"file_name": "m/5.jpg", "boxes": [[100, 100, 300, 150]]},
    {"file_name": "m/6.jpg", "objects": {"bbox": []}},
]
CSV = (
    "file_name,label,x0,y0,x1,y1,score\nm/1.jpg,a,100,100,300,150,0.5\nm/1.jpg,a,1.5,2,3,4,\nm/2.jpg,b,,,,,\n"
    '"m/3, left.jpg",b,5,6,7,8,1\n'
)


@pytest.fixture
def save(tmp_path):
    def write(content, name="boxes.json"):
        path = tmp_path / name
        if isinstance(content, list) and name.endswith("l"):
            content = "\n".join(map(json.dumps, content))
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refused(path):
    """The message with which a file is refused: one sentence that names it."""
    with pytest.raises(L2R2Error) as caught:
        read_boxes(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    return message


def in_pixels(entry, size=(200, 400)):
    found = entry.detections(size, "image")
    return found.boxes.tolist(), pytest.approx(found.scores.tolist()), found.labels


# ---- reading ----


def test_megadetector(save):
    table = read_boxes(save(MEGADETECTOR))
    assert table.format == "MegaDetector" and list(table.entries) == [f"a/{i}.jpg" for i in range(1, 6)]
    boxes, scores, labels = in_pixels(table.entries["a/1.jpg"])
    assert boxes == [[0, 0, 400, 200], [100, 100, 300, 150]] and scores == [0.95, 0.9] and labels == ("person", "animal")
    assert len(table.entries["a/2.jpg"].detections((5, 5), "")) == 0 and table.entries["a/2.jpg"].failure is None
    assert table.entries["a/3.jpg"].failure == "Image access failure" and table.entries["a/3.jpg"].boxes == ()
    assert table.entries["a/4.jpg"].image_size == (200, 400) and table.entries["a/5.jpg"].failure


def test_speciesnet(save):
    table = read_boxes(save(SPECIESNET))
    assert table.format == "SpeciesNet"
    boxes, scores, labels = in_pixels(table.entries["s/1.jpg"])
    assert boxes[0] == [100, 100, 300, 150] and scores == [0.8, 0.1] and labels == ("animal", "human")
    assert table.entries["s/2.jpg"].failure == "DETECTOR, CLASSIFIER" and table.entries["s/4.jpg"].failure is None


def test_speciesnet_keeps_boxes_where_another_part_failed(save, tmp_path):
    table = read_boxes(save(SPECIESNET))
    assert table.entries["s/3.jpg"].failure is None
    write_boxes(table, tmp_path / "out.json")
    assert len(read_boxes(tmp_path / "out.json").entries["s/3.jpg"].boxes) == 1


def test_coco(save):
    table = read_boxes(save(COCO))
    boxes, scores, labels = in_pixels(table.entries["c/1.jpg"])
    assert table.format == "COCO" and boxes == [[100, 100, 300, 150], [0.5, 0, 10.5, 10.25]]
    assert scores == [1, 0.25] and labels == ("cat", "") and table.entries["c/1.jpg"].image_size == (200, 400)
    assert table.entries["c/2.jpg"].boxes == () and table.entries["c/2.jpg"].image_size is None


def test_plain(save):
    table = read_boxes(save(PLAIN))
    assert table.format == "plain xyxy" and in_pixels(table.entries["p/1.jpg"])[0] == PLAIN["p/1.jpg"]
    assert table.entries["p/2.jpg"].boxes == ()


def test_jsonl(save):
    table = read_boxes(save(ROWS, "metadata.jsonl"))
    assert table.format == "metadata" and list(table.entries) == [f"m/{i}.jpg" for i in range(1, 7)]
    boxes, scores, _ = in_pixels(table.entries["m/1.jpg"])
    assert boxes == [[1.5, 2, 3, 4], [100, 100, 300, 150]] and scores == [1, 0.5]  # best first; without a score it is 1
    assert in_pixels(table.entries["m/3.jpg"])[0] == [[100, 100, 300, 150]] and table.entries["m/3.jpg"].scores == (0.75,)
    assert table.entries["m/4.jpg"].boxes[1] == (1, 2, 4, 6) and table.entries["m/5.jpg"].boxes == ((100, 100, 300, 150),)
    assert table.entries["m/2.jpg"].boxes == table.entries["m/6.jpg"].boxes == ()


@pytest.mark.parametrize("change", [lambda t: t, lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n"), lambda t: t + "\n"])
def test_csv_with_bom_and_crlf(save, change):
    entries = read_boxes(save(change(CSV), "metadata.csv")).entries
    assert entries["m/1.jpg"].boxes == ((100, 100, 300, 150), (1.5, 2, 3, 4)) and entries["m/1.jpg"].scores == (0.5, 1)
    assert entries["m/2.jpg"].boxes == () and entries["m/3, left.jpg"].boxes == ((5, 6, 7, 8),)


@pytest.mark.parametrize("content, name", [(PLAIN, "a.json"), (MEGADETECTOR, "a.txt"), (ROWS, "a.jsonl")])
def test_json_with_bom_and_crlf(save, content, name):
    path = save(content, name)
    plain, text = read_boxes(path), path.read_text()
    text = text.replace("\n", "\r\n") if name == "a.jsonl" else text.replace(", ", ",\r\n")
    assert read_boxes(save("\ufeff" + text, name)).entries == plain.entries


def test_rows_keep_their_other_columns(save):
    assert [row["label"] for row in read_rows(save(CSV, "m.csv"))] == ["a", "a", "b", "b"]


# ---- writing ----


def table_of_everything():
    entries = {
        "a/b.jpg": (((1.25, 2.5, 333.3333, 199.999), (0, 0, 400, 200)), (0.123456, 1.0), ("cat", ""), False, (200, 400)),
        "wide.jpg": (((0.1, 0.2, 9999.7, 2999.9), (-5.5, -7.25, 9900, 3100)), (0.5, 0.25), ("", "dog"), False, (3000, 10000)),
        "relative.jpg": (((0.1, 0.2, 0.30001, 0.9),), (0.75,), ("cat",), True, (480, 640)),
        "nothing.jpg": ((), (), (), False, (10, 20)),
        "unreadable.jpg": ((), (), (), False, None, "cannot be decoded"),
        "été.jpg": (((1, 2, 3, 4),), (1.0,), ("",), False, (9, 9)),
    }
    return BoxTable({file: BoxEntry(*values) for file, values in entries.items()})


@pytest.mark.parametrize("format", ["megadetector", "coco", "xyxy"])
def test_round_trip(tmp_path, format):
    table = table_of_everything()
    write_boxes(table, tmp_path / "out.json", format)
    again = read_boxes(tmp_path / "out.json")
    for file, entry in table.entries.items():
        if entry.failure is not None:
            continue
        size = entry.image_size
        old, new = entry.detections(size, file), again.entries[file].detections(size, file)
        if format == "xyxy":  # it has neither scores nor labels
            old = old.select(torch.argsort(old.boxes[:, 2]))
            new = new.select(torch.argsort(new.boxes[:, 2]))
        else:
            assert torch.allclose(old.scores, new.scores, atol=1e-4)
            assert [label or "object" for label in old.labels] == list(new.labels)
        assert torch.allclose(old.boxes.double(), new.boxes.double(), rtol=0, atol=1e-3), file


@pytest.mark.parametrize("format", ["megadetector", "coco"])
def test_failures_are_kept(tmp_path, format):
    write_boxes(table_of_everything(), tmp_path / "out.json", format)
    again = read_boxes(tmp_path / "out.json").entries
    assert again["unreadable.jpg"].failure == "cannot be decoded" and again["nothing.jpg"].failure is None


def test_plain_lists_do_not_say_that_a_failed_image_is_empty(tmp_path):
    write_boxes(table_of_everything(), tmp_path / "out.json", "xyxy")
    again = read_boxes(tmp_path / "out.json").entries
    assert "unreadable.jpg" not in again and again["nothing.jpg"].boxes == ()


def test_written_megadetector_is_version_1_6(tmp_path):
    write_boxes(table_of_everything(), tmp_path / "out.json")
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert data["info"]["format_version"] == "1.6" and set(data["detection_categories"].values()) == {"cat", "dog", "object"}
    by_file = {image["file"]: image for image in data["images"]}
    assert by_file["nothing.jpg"]["detections"] == [] and "detections" not in by_file["unreadable.jpg"]
    assert all(d["category"] in data["detection_categories"] for i in data["images"] for d in i.get("detections", []))


@pytest.mark.parametrize("format, normalised", [("megadetector", False), ("coco", False), ("coco", True), ("xyxy", True)])
def test_writing_without_the_size_that_is_needed(tmp_path, format, normalised):
    table = BoxTable({"a.jpg": BoxEntry(((0, 0, 1, 1),), (1.0,), ("",), normalised)})
    with pytest.raises(L2R2Error, match=r"a\.jpg: its image size is not known"):
        write_boxes(table, tmp_path / "out.json", format)
    assert not list(tmp_path.iterdir())


def test_unknown_format_to_write(tmp_path):
    with pytest.raises(L2R2Error, match="megadetector, coco, xyxy"):
        write_boxes(table_of_everything(), tmp_path / "out.json", "voc")


def test_numbers_that_json_has_not(tmp_path):
    table = BoxTable({"a.jpg": BoxEntry(((0, 0, float("nan"), 1),), (1.0,), ("",), False, (5, 5))})
    with pytest.raises(L2R2Error, match=r"out\.json"):
        write_boxes(table, tmp_path / "out.json", "xyxy")
    assert not list(tmp_path.iterdir())


def test_file_names_that_are_not_utf8_survive(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")  # what Python makes of a Latin-1 name on Linux
    for format in ("megadetector", "coco", "xyxy"):
        write_boxes(BoxTable({name: BoxEntry((), (), (), False, (5, 5))}), tmp_path / "out.json", format)
        assert list(read_boxes(tmp_path / "out.json").entries) == [name]


# ---- joining ----


def table(*names):
    return BoxTable({name: BoxEntry(failure=name) for name in names}, "boxes.json")


def joined(names, paths):
    return {path: entry.failure for path, entry in table(*names).join(paths).items()}


@pytest.mark.parametrize(
    "name, path",
    [
        ("a/1.jpg", "a/1.jpg"), ("a/1.jpg", "./a/1.jpg"), ("./a/1.jpg", "a/1.jpg"), ("a/1.jpg", "/data/a/1.jpg"),
        ("/data/a/1.jpg", "a/1.jpg"), ("1.jpg", "/data/a/1.jpg"), ("/data/a/1.jpg", "1.jpg"), ("a\\1.jpg", "a/1.jpg"),
        ("C:\\data\\a\\1.jpg", "a/1.jpg"), ("a/1.jpg", "D:\\data\\a\\1.jpg"), ("a//1.jpg", "a/1.jpg"),
        ("a/1.jpg", "../x/a/1.jpg"),
        ("a/cafe\u0301.jpg", "a/caf\u00e9.jpg"),
    ],
)  # fmt: skip
def test_the_same_image_under_another_path(name, path):
    assert joined([name, "b/other.jpg"], [path]) == {path: name}


@pytest.mark.parametrize("name, path", [("a/1.jpg", "b/1.jpg"), ("1.jpg", "11.jpg"), ("xa/1.jpg", "a/1.jpg"), ("1.JPG", "1.jpg")])
def test_another_image(name, path):
    with pytest.raises(L2R2Error, match=r"boxes\.json: none of its 1 entries"):
        table(name).join([path])


def test_an_ambiguous_name_is_refused():
    with pytest.raises(L2R2Error, match=r"boxes\.json: 2 entries fit 1\.jpg"):
        table("a/1.jpg", "b/1.jpg").join(["1.jpg"])


@pytest.mark.parametrize("exact", ["1.jpg", "./1.jpg", "\\1.jpg"])
def test_the_same_path_goes_before_a_longer_one(exact):
    path = "/1.jpg" if exact.startswith("\\") else "1.jpg"
    assert joined([exact, "b/1.jpg"], [path]) == {path: exact}


def test_one_entry_for_two_images_is_refused():
    with pytest.raises(L2R2Error, match=r"one entry fits both a/1\.jpg and b/1\.jpg"):
        table("1.jpg").join(["a/1.jpg", "b/1.jpg"])


def test_the_same_image_twice_is_no_conflict():
    assert joined(["1.jpg"], ["a/1.jpg", "a/1.jpg"]) == {"a/1.jpg": "1.jpg"}


def test_entries_that_are_one_object_are_no_conflict():
    empty = BoxEntry()
    assert set(BoxTable({"1.jpg": empty, "2.jpg": empty}).join(["1.jpg", "2.jpg"])) == {"1.jpg", "2.jpg"}


def test_images_without_an_entry_are_left_out():
    assert joined(["1.jpg", "3.jpg"], ["x/1.jpg", "x/2.jpg", "x/3.jpg"]) == {"x/1.jpg": "1.jpg", "x/3.jpg": "3.jpg"}
    assert table("1.jpg").find("2.jpg") is None and table("1.jpg").find("") is None and table("1.jpg").find("/") is None


# ---- the size ----


def test_boxes_made_for_another_size_are_refused():
    entry = BoxEntry(image_size=(200, 400))
    assert len(entry.detections((200, 400), "a.jpg")) == 0
    with pytest.raises(L2R2Error, match=r"^a\.jpg: .* 400x200 image, this one is 401x200\.$"):
        entry.detections((200, 401), "a.jpg")
    with pytest.raises(L2R2Error, match=r"^a\.jpg: .* 400x200 image, this one is 200x400; .*EXIF"):
        entry.detections((400, 200), "a.jpg")


@pytest.mark.parametrize("size", [[200, 400], torch.Size([200, 400])])
def test_the_type_of_the_size_does_not_matter(size):
    assert len(BoxEntry(image_size=(200, 400)).detections(size, "a.jpg")) == 0


@pytest.mark.parametrize("size", [["200", 400], [200.5, 400], [True, True], [0, 400], [-200, 400], [[200], 400], [1e400, 5]])
def test_sizes_that_are_none(save, size):
    for data in (copy.deepcopy(MEGADETECTOR), copy.deepcopy(COCO)):
        data["images"][0].update(height=size[0], width=size[1])
        assert "size" in refused(save(data))


# ---- pixels or fractions ----


@pytest.mark.parametrize(
    "content, name",
    [
        ({"a.jpg": [[0.1, 0.2, 0.9, 1.0]], "b.jpg": []}, "a.json"),
        ("file_name,x0,y0,x1,y1\na.jpg,0.1,0.2,0.9,1\n", "a.csv"),
        ([{"file_name": "a.jpg", "boxes": [[0.1, 0.2, 0.9, 1.0]]}], "a.jsonl"),
        ({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": [0.1, 0.2, 0.5, 0.5]}]}, "a.json"),
    ],
)
def test_fractions_where_pixels_are_meant_are_refused(save, content, name):
    assert "[0, 1]" in refused(save(content, name))


def test_one_small_box_among_others_is_fine(save):
    assert len(read_boxes(save({"a.jpg": [[0, 0, 1, 1], [0, 0, 2, 2]]})).entries["a.jpg"].boxes) == 2


@pytest.mark.parametrize("content", [MEGADETECTOR, SPECIESNET])
def test_pixels_where_fractions_are_meant_are_refused(save, content):
    data = copy.deepcopy(content)
    image = (data.get("images") or data["predictions"])[0]
    image["detections"][0]["bbox"] = [100, 120, 200, 50]
    assert "pixels" in refused(save(data)) and "/1.jpg" in refused(save(data))


def test_fractions_a_little_outside_are_fine(save):
    data = {"info": {}, "images": [{"file": "a", "detections": [{"category": "1", "conf": 1, "bbox": [-0.01, 0, 1.02, 1.0001]}]}]}
    assert len(read_boxes(save(data)).entries["a"].detections((10, 10), "a").usable()) == 1


# ---- malformed ----


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2", "text", b"\xff\xfe{\x00}\x00", b"\x80abc", "null", "5", "[]", "{}", '"a"', "[[1,2,3,4]]"]
)
def test_what_is_no_box_file(save, content):
    refused(save(content))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize(
    "content",
    ["", b"\x80\x81,\xff\n1,2", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "a\0b", "file_name\n", "x,y\n1,2\n"],
    ids=["empty", "bytes", "deep", "digits", "nul", "header", "columns"],
)
def test_what_is_no_file_of_its_suffix(save, content, name):
    refused(save(content, name))


def test_missing_file_and_folder(tmp_path):
    assert "no such box file" in refused(tmp_path / "none.json")
    for name in ("f.json", "f.csv", "f.jsonl"):
        (tmp_path / name).mkdir()
        refused(tmp_path / name)


NO_BOXES = [
    [1, 2, 3], [1, 2, 3, 4, 5], [], None, "abcd", "1234", [1, 2, None, 4], ["1", "2", "3", "4"], 5, {}, [True, False, True, True],
    [1, 2, float("nan"), 4], [1, 2, float("inf"), 4], [[1, 2, 3, 4]], [0, 0, 10**400, 5],
]  # fmt: skip


@pytest.mark.parametrize("bad", NO_BOXES, ids=range(len(NO_BOXES)))
def test_boxes_that_are_none(save, bad):
    for content, name in (
        ({"a.jpg": [[5, 5, 9, 9], bad]}, "a.json"),
        ([{"file_name": "a.jpg", "boxes": [bad]}], "a.jsonl"),
        ([{"file_name": "a.jpg", "objects": {"bbox": [bad]}}], "a.jsonl"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": bad}]}, "a.json"),
        ({"info": {}, "images": [{"file": "a.jpg", "detections": [{"category": "1", "conf": 1, "bbox": bad}]}]}, "a.json"),
        ({"predictions": [{"filepath": "a.jpg", "detections": [{"conf": 1, "bbox": bad}]}]}, "a.json"),
    ):
        refused(save(content, name))


@pytest.mark.parametrize("bad", [-0.1, 1.5, 93, None, "high", "0.5", True, [0.5], float("nan"), float("inf")])
def test_scores_that_are_none(save, bad):
    coco = {"image_id": 1, "bbox": [0, 0, 9, 9], "score": bad}
    relative = {"category": "1", "conf": bad, "bbox": [0, 0, 1, 1]}
    for content, name in (
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [coco]}, "a.json"),
        ({"info": {}, "images": [{"file": "a.jpg", "detections": [relative]}]}, "a.json"),
        ({"predictions": [{"filepath": "a.jpg", "detections": [relative]}]}, "a.json"),
        ([{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, 4]], "score": [bad]}}], "a.jsonl"),
    ):
        assert "score" in refused(save(content, name)) and "a.jpg" in refused(save(content, name))


def test_scores_and_boxes_of_different_number(save):
    assert "1 boxes and 2 scores" in refused(
        save([{"file_name": "a", "objects": {"bbox": [[1, 2, 3, 4]], "score": [1, 1]}}], "a.jsonl")
    )


def test_a_csv_error_names_the_file_and_the_image(save):
    for cells in ("1,2,3,", "1,2,3,x", "1,2,3,nan", "1,2"):
        assert "a.jpg" in refused(save(f"file_name,x0,y0,x1,y1\na.jpg,{cells}\n", "boxes.csv"))


@pytest.mark.parametrize(
    "name, text, row", [("a.csv", "file_name,x0\na,\n,5\n", 3), ("a.jsonl", '{"file_name": "a"}\n{"x0": 5}\n', 2)]
)
def test_a_row_without_name_is_counted_as_in_an_editor(save, name, text, row):
    assert f"row {row}" in refused(save(text, name))


@pytest.mark.parametrize("name", [5, None, True, "", ["a"], {}, 1.5])
def test_names_that_are_no_paths(save, name):
    for key, list_name, content in (
        ("file", "images", MEGADETECTOR),
        ("filepath", "predictions", SPECIESNET),
        ("file_name", "images", COCO),
    ):
        data = copy.deepcopy(content)
        data[list_name][0][key] = name
        refused(save(data))


def test_two_entries_for_one_image_are_refused_instead_of_dropped(save):
    for content, where in ((MEGADETECTOR, "images"), (SPECIESNET, "predictions"), (COCO, "images")):
        data = copy.deepcopy(content)
        data[where].append(data[where][0])
        assert "two entries" in refused(save(data))


def test_coco_annotations_of_other_images_are_refused(save):
    data = copy.deepcopy(COCO)
    data["images"][0]["id"] = "7"  # text where the annotations have a number
    assert "image_id" in refused(save(data))


def damaged(data, rng):
    """A copy with one random key, item or value deleted, replaced or doubled."""
    data = copy.deepcopy(data)
    places = []
    junk = [None, "text", "", [], [1], {}, {"a": 1}, float("nan"), float("inf"), -5, 0, 1, 1e300, 10**400, True, [[]], "ä\ud800"]

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(data)
    for _ in range(rng.randint(1, 2)):
        node, key = rng.choice(places)
        if rng.random() < 0.25:
            if isinstance(node, dict):
                node.pop(key, None)
            elif key < len(node):
                del node[key]
        elif isinstance(node, dict) or key < len(node):
            node[key] = rng.choice(junk)
    return data


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "content", [MEGADETECTOR, SPECIESNET, COCO, PLAIN, ROWS], ids=["md", "speciesnet", "coco", "plain", "rows"]
)
def test_random_damage_is_read_or_refused(save, tmp_path, content, seed):
    """Never a KeyError: and what is read can be used, joined and written."""
    rng = random.Random(seed)
    for _ in range(70):
        path = save(damaged(content, rng), "a.jsonl" if content is ROWS else "a.json")
        try:
            table = read_boxes(path)
        except L2R2Error as error:
            assert str(error).startswith(f"{path}: "), error
            continue
        for file, entry in table.entries.items():
            found = BoxEntry(entry.boxes, entry.scores, entry.labels, entry.normalised).detections((200, 400), file)
            assert len(found.usable().sorted()) <= len(entry.boxes)
        for format in ("megadetector", "coco", "xyxy"):
            try:
                write_boxes(table, tmp_path / "out.json", format)
            except L2R2Error as error:
                assert "size is not known" in str(error), error
        if table.entries:
            assert table.join([next(iter(table.entries))])


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_to_csv(save, seed):
    rng = random.Random(seed)
    for _ in range(150):
        text = list(CSV)
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(["", ",", "\n", '"', "\0", "nan", "-", "é", ";", "e999", "x"])
        path = save("".join(text), "a.csv")
        try:
            read_boxes(path)
        except L2R2Error as error:
            assert str(error).startswith(f"{path}: ")
