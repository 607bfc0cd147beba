"""Malformed box files are refused with one sentence, never with a KeyError."""

import copy
import random

import pytest
from box_file_cases import COCO, CSV, MEGADETECTOR, PLAIN, ROWS, SPECIESNET, refused, write_content

from l2r2_models.boxes import BoxEntry, read_boxes, write_boxes
from l2r2_models.errors import L2R2Error


@pytest.fixture
def save(tmp_path):
    return lambda content, name="boxes.json": write_content(tmp_path / name, content)


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
    [1, 2, 3],
    [1, 2, 3, 4, 5],
    [],
    None,
    "abcd",
    "1234",
    [1, 2, None, 4],
    ["1", "2", "3", "4"],
    5,
    {},
    [True, False, True, True],
    [1, 2, float("nan"), 4],
    [1, 2, float("inf"), 4],
    [[1, 2, 3, 4]],
    [0, 0, 10**400, 5],
]


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
            found = BoxEntry(entry.boxes, entry.scores, entry.labels, entry.normalized).detections((200, 400), file)
            assert len(found.usable().sorted()) <= len(entry.boxes)
        for format in ("megadetector", "coco", "xyxy"):
            try:
                write_boxes(table, tmp_path / "out.json", format)
            except L2R2Error as error:
                assert "needs its image size" in str(error), error
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
