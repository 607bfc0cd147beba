"""Box files: every format is read and written, and joined to its images by path."""

import copy
import json

import pytest
import torch
from box_file_cases import COCO, CSV, MEGADETECTOR, PLAIN, ROWS, SPECIESNET, refused, write_content

from l2r2_models.boxes import BoxEntry, BoxTable, read_boxes, read_rows, write_boxes
from l2r2_models.errors import L2R2Error


@pytest.fixture
def save(tmp_path):
    return lambda content, name="boxes.json": write_content(tmp_path / name, content)


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


def test_plain_lists_do_not_make_a_failed_image_empty(tmp_path):
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


@pytest.mark.parametrize("format, normalized", [("megadetector", False), ("coco", False), ("coco", True), ("xyxy", True)])
def test_writing_without_the_size_that_is_needed(tmp_path, format, normalized):
    table = BoxTable({"a.jpg": BoxEntry(((0, 0, 1, 1),), (1.0,), ("",), normalized)})
    with pytest.raises(L2R2Error, match=r"a\.jpg: the \w+ format needs its image size"):
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
        ("a/1.jpg", "a/1.jpg"),
        ("a/1.jpg", "./a/1.jpg"),
        ("./a/1.jpg", "a/1.jpg"),
        ("a/1.jpg", "/data/a/1.jpg"),
        ("/data/a/1.jpg", "a/1.jpg"),
        ("1.jpg", "/data/a/1.jpg"),
        ("/data/a/1.jpg", "1.jpg"),
        ("a\\1.jpg", "a/1.jpg"),
        ("C:\\data\\a\\1.jpg", "a/1.jpg"),
        ("a/1.jpg", "D:\\data\\a\\1.jpg"),
        ("a//1.jpg", "a/1.jpg"),
        ("a/1.jpg", "../x/a/1.jpg"),
        ("a/cafe\u0301.jpg", "a/caf\u00e9.jpg"),
    ],
)
def test_the_same_image_under_another_path(name, path):
    assert joined([name, "b/other.jpg"], [path]) == {path: name}


@pytest.mark.parametrize("name, path", [("a/1.jpg", "b/1.jpg"), ("1.jpg", "11.jpg"), ("xa/1.jpg", "a/1.jpg"), ("1.JPG", "1.jpg")])
def test_another_image(name, path):
    with pytest.raises(L2R2Error, match=r"boxes\.json: none of its 1 entries"):
        table(name).join([path])


def test_an_ambiguous_name_is_refused():
    with pytest.raises(L2R2Error, match=r"boxes\.json: 2 entries match 1\.jpg"):
        table("a/1.jpg", "b/1.jpg").join(["1.jpg"])


@pytest.mark.parametrize("exact", ["1.jpg", "./1.jpg", "\\1.jpg"])
def test_the_same_path_goes_before_a_longer_one(exact):
    path = "/1.jpg" if exact.startswith("\\") else "1.jpg"
    assert joined([exact, "b/1.jpg"], [path]) == {path: exact}


def test_one_entry_for_two_images_is_refused():
    with pytest.raises(L2R2Error, match=r"one entry matches both a/1\.jpg and b/1\.jpg"):
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
    with pytest.raises(L2R2Error, match=r"^a\.jpg: .* 400x200 image, but this one is 401x200; use boxes made for this file\.$"):
        entry.detections((200, 401), "a.jpg")
    with pytest.raises(L2R2Error, match=r"^a\.jpg: .* 400x200 image, but this one is 200x400; .*EXIF"):
        entry.detections((400, 200), "a.jpg")


@pytest.mark.parametrize("size", [[200, 400], torch.Size([200, 400])])
def test_the_type_of_the_size_does_not_matter(size):
    assert len(BoxEntry(image_size=(200, 400)).detections(size, "a.jpg")) == 0


@pytest.mark.parametrize("size", [["200", 400], [200.5, 400], [True, True], [0, 400], [-200, 400], [[200], 400], [1e400, 5]])
def test_sizes_that_are_none(save, size):
    for data in (copy.deepcopy(MEGADETECTOR), copy.deepcopy(COCO)):
        data["images"][0].update(height=size[0], width=size[1])
        assert "size" in refused(save(data))


# ---- columns ----

HEADERS = {
    "x0,y0,x1,y1": "4,6,20,30",
    "x0, y0, x1, y1": "4, 6, 20, 30",
    "X_min,Y_min,X_max,Y_max": "4,6,20,30",
    "xmin,ymin,xmax,ymax": "4,6,20,30",
    "bbox_x0,bbox_y0,bbox_x1,bbox_y1": "4,6,20,30",
    "x1,y1,x2,y2": "4,6,20,30",
    "Left,Top,Right,Bottom": "4,6,20,30",
    "x,y,w,h": "4,6,16,24",
    "bbox_x,bbox_y,bbox_width,bbox_height": "4,6,16,24",
    "xmin,ymin,width,height": "4,6,16,24",
    "left,top,width,height": "4,6,16,24",
}


@pytest.mark.parametrize("header", HEADERS)
def test_usual_column_names_are_boxes(header, tmp_path):
    file = tmp_path / "boxes.csv"
    file.write_text(f"file_name,{header},score\na.jpg,{HEADERS[header]},0.5\nb.jpg,,,,,\n")
    entries = read_boxes(file).entries
    assert entries["a.jpg"].boxes == ((4, 6, 20, 30),) and entries["a.jpg"].scores == (0.5,)
    assert entries["b.jpg"].boxes == ()


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("px,py,qx,qy", "has no box columns; name its columns x0,y0,x1,y1 or"),
        ("label,split,a,b", "has no box columns"),
        ("bbox", "bbox looks like a box in an unsupported form; name its columns"),
        ("cx,cy,w,h", "cx, cy looks like a box"),
        ("xtl,ytl,xbr,ybr", "xtl, ytl, xbr, ybr looks like a box"),
        ("xmin,ymin,xmax,b", "the box is incomplete, with only xmin, ymin, xmax"),
        ("x0,y0,x1,y_1,y1", "the columns y_1 and y1 could both belong to the box"),
        ("x0,y0,x1,y1,xmin,ymin,xmax,ymax", "both x0, y0, x1, y1 and xmin, ymin, xmax, ymax could be the box"),
    ],
)
def test_a_file_whose_boxes_are_not_understood_is_refused(header, why, tmp_path):
    file = tmp_path / "boxes.csv"
    file.write_text(f"file_name,{header}\na.jpg,{','.join('4' for _ in header.split(','))}\n")
    with pytest.raises(L2R2Error, match=why) as caught:
        read_boxes(file)
    assert str(caught.value).startswith(str(file))


def test_a_line_that_is_written_twice_is_one_object(tmp_path):
    file = tmp_path / "boxes.csv"
    file.write_text("file_name,x0,y0,x1,y1,score\n" + "a.jpg,1,2,3,4,0.5\n" * 2 + "a.jpg,1,2,3,4,0.9\n")
    assert read_boxes(file).entries["a.jpg"].scores == (0.5, 0.9)
    (tmp_path / "boxes.json").write_text(json.dumps({"a.jpg": [[1, 2, 3, 4], [1.0, 2, 3, 4]]}))
    assert len(read_boxes(tmp_path / "boxes.json").entries["a.jpg"].boxes) == 1


def test_a_pipe_is_no_box_file(tmp_path):
    import os

    for name in ("boxes.csv", "boxes.jsonl", "boxes.json", "boxes.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(L2R2Error, match="is not a regular file"):
            read_boxes(tmp_path / name)


def test_metadata_whose_boxes_are_not_understood_is_refused_too(tmp_path):
    """Silently without boxes, the whole image would answer."""
    from l2r2_models.data.table import read_table

    (tmp_path / "a.jpg").touch()
    (tmp_path / "metadata.csv").write_text("file_name,label,bbox\na.jpg,x,4 6 20 30\n")
    with pytest.raises(L2R2Error, match="bbox looks like a box"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("file_name;xmin;ymin;xmax;ymax\na.jpg;1;2;3;4\n", "separated by ';'"),
        ("filename,xmin,ymin,xmax,ymax\na.jpg,1,2,3,4\n", "no column file_name; rename filename"),
        ("Image Path,x0,y0,x1,y1\na.jpg,1,2,3,4\n", "rename Image Path"),
        ("file_name,x0,y0,x1,y1,x0\na.jpg,1,2,3,4,5\n", "two columns called x0"),
        ("file_name,x0,y0,x1,y1\na.jpg,1,2,3,4,0.9\n", "line 2 has more values"),
    ],
)
def test_a_csv_that_could_be_misread_is_refused(save, text, sentence):
    with pytest.raises(L2R2Error, match=sentence):
        read_boxes(save(text, "boxes.csv"))


@pytest.mark.parametrize("name", ["score", "Score", "confidence", "CONF"])
def test_scores_are_known_by_their_usual_names(save, name):
    table = read_boxes(save(f"file_name,x0,y0,x1,y1,{name}\na.jpg,1,2,3,4,0.25\n", "boxes.csv"))
    assert table.entries["a.jpg"].scores == (0.25,)
