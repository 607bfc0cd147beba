"""Box files of annotation tools; the same two boxes, written by each tool's rules, are read as the same pixels."""

import json

import numpy as np
import pytest

from l2r2_models import L2R2Error
from l2r2_models.boxes import read_boxes
from l2r2_models.boxes.detections import Detections

SIZE = (100, 200)  # height and width
BOXES = [(20.0, 10.0, 60.0, 50.0), (100.0, 40.0, 200.0, 100.0)]
LABELS = ["fox", "owl"]


def yolo(folder):
    (folder / "labels" / "train").mkdir(parents=True)
    (folder / "data.yaml").write_text("names: {0: owl, 1: fox}")
    lines = ["1 0.2 0.3 0.2 0.4", "0 0.75 0.7 0.5 0.6"]
    (folder / "labels" / "train" / "a.txt").write_text("\n".join(lines) + "\n")
    return folder / "labels"


def yolo_with_images(folder):
    yolo(folder)
    (folder / "images" / "train").mkdir(parents=True)
    return folder


def yolo_polygons(folder):
    labels = yolo(folder)
    (labels / "train" / "a.txt").write_text("1 0.1 0.1 0.3 0.1 0.2 0.5\n0 0.5 0.4 1 0.4 1 1 0.5 1")
    return labels


def voc(folder):
    (folder / "train").mkdir(parents=True)
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x0 + 1:.0f}</xmin><ymin>{y0 + 1:.0f}</ymin><xmax>{x1:.0f}</xmax>"
        f"<ymax>{y1:.0f}</ymax></bndbox></object>"
        for label, (x0, y0, x1, y1) in zip(LABELS, BOXES)
    )
    size = "<size><width>200</width><height>100</height><depth>3</depth></size>"
    xml = f"<annotation><filename>a.jpg</filename>{size}{objects}</annotation>"
    (folder / "train" / "a.xml").write_text(xml)
    return folder


def labelme(folder):
    (folder / "train").mkdir(parents=True)
    (x0, y0, x1, y1), (u0, v0, u1, v1) = BOXES
    shapes = [
        {"label": "fox", "points": [[x1, y1], [x0, y0]], "shape_type": "rectangle"},
        {"label": "owl", "points": [[u0, v0], [u1, v0], [u1, v1], [u0, v1]], "shape_type": "polygon"},
    ]
    data = {"imagePath": "..\\photos\\a.jpg", "shapes": shapes, "imageHeight": 100, "imageWidth": 200}
    (folder / "train" / "a.json").write_text(json.dumps(data))
    return folder


def label_studio(folder):
    folder.mkdir(parents=True)
    results = [
        {
            "type": "rectanglelabels",
            "original_width": 200,
            "original_height": 100,
            "value": {"x": x0 / 2, "y": y0, "width": (x1 - x0) / 2, "height": y1 - y0, "rectanglelabels": [label], "rotation": 0},
        }
        for label, (x0, y0, x1, y1) in zip(LABELS, BOXES)
    ]
    annotations = [{"was_cancelled": True, "result": []}, {"result": [*results, {"type": "choices", "value": {}}]}]
    tasks = [{"id": 1, "data": {"image": "/data/upload/1/0a1b2c3d-a.jpg"}, "annotations": annotations}]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return folder / "tasks.json"


def cvat(folder):
    folder.mkdir(parents=True)
    (x0, y0, x1, y1), (u0, v0, u1, v1) = BOXES
    box = f'<box label="fox" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}"/>'
    polygon = f'<polygon label="owl" points="{u0},{v0};{u1},{v0};{u1},{v1}"/>'
    image = f'<image id="0" name="train/a.jpg" width="200" height="100">{box}{polygon}</image>'
    (folder / "annotations.xml").write_text(f"<annotations><version>1.1</version>{image}</annotations>")
    return folder / "annotations.xml"


def openimages(folder):
    folder.mkdir(parents=True)
    rows = [f"a,xclick,{label},1,{x0 / 200},{x1 / 200},{y0 / 100},{y1 / 100}" for label, (x0, y0, x1, y1) in zip(LABELS, BOXES)]
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax"
    (folder / "boxes.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "boxes.csv"


WRITERS = [yolo, yolo_with_images, yolo_polygons, voc, labelme, label_studio, cvat, openimages]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_pixels(write, tmp_path):
    table = read_boxes(write(tmp_path / "boxes"))
    found = table.join(["photos/train/a.jpg", "photos/train/b.jpg"])
    assert set(found) == {"photos/train/a.jpg"}
    boxes = found["photos/train/a.jpg"].detections(SIZE, "a.jpg")
    assert np.allclose(boxes.boxes.numpy(), BOXES, atol=1e-3)
    assert boxes.labels == tuple(LABELS)


def test_coco_results_by_name(tmp_path):
    results = [{"image_id": "a", "category_id": 1, "bbox": [20, 10, 40, 40], "score": 0.5}]
    (tmp_path / "results.json").write_text(json.dumps(results))
    (entry,) = read_boxes(tmp_path / "results.json").join(["photos/a.png"]).values()
    assert entry.boxes == (BOXES[0],) and entry.scores == (0.5,)
    (tmp_path / "results.json").write_text(json.dumps([{**results[0], "image_id": name} for name in ("IMG.0001", "b.v2.JPG")]))
    table = read_boxes(tmp_path / "results.json")  # a dot is not yet a suffix
    assert list(table.join(["photos/IMG.0001.png", "photos/b.v2.JPG"])) == ["photos/IMG.0001.png", "photos/b.v2.JPG"]
    (tmp_path / "results.json").write_text(json.dumps([{**results[0], "image_id": 7}]))
    with pytest.raises(L2R2Error, match="image_id 7 is not the name of an image"):
        read_boxes(tmp_path / "results.json")


def test_two_images_of_one_stem_are_not_confused(tmp_path):
    with pytest.raises(L2R2Error, match="one entry matches both"):
        read_boxes(openimages(tmp_path / "boxes")).join(["photos/a.jpg", "photos/a.png"])


@pytest.mark.parametrize(
    "write, name, content, message",
    [
        (yolo, "train/a.txt", "1 40 30 20 40", "in pixels"),
        (yolo, "train/a.txt", "fox 0.1 0.1 0.1 0.1", "is not a YOLO file"),
        (yolo, "train/a.txt", "1 0.1 0.1 0.1", "is not `class x y width height`"),
        (yolo, "train/b.xml", "<annotation/>", "has both .txt and .xml files"),
        (voc, "train/a.xml", "<annotation><object></object></annotation>", "is not four finite numbers"),
        (voc, "train/a.xml", "<annotation>", "is not a Pascal VOC file"),
        (labelme, "train/a.json", "{}", "is not a LabelMe file"),
        (labelme, "train/a.json", '[{"images": []}]', "is not a LabelMe file, and other JSON is not read by folder"),
        (labelme, "train/a.json", "[", "a.json"),
    ],
)
def test_damaged_folders(write, name, content, message, tmp_path):
    folder = write(tmp_path / "boxes")
    (folder / name).write_text(content)
    with pytest.raises(L2R2Error, match=message) as caught:
        read_boxes(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "write, content, message",
    [
        (cvat, "<annotations><track/></annotations>", "not an export of CVAT for images"),
        (cvat, "<annotations", "not an export of CVAT for images"),
        (openimages, "ImageID,XMin,XMax,YMin,YMax\na,0,x,0,1", "looks like OpenImages, but is malformed"),
        (label_studio, '[{"data": {}, "annotations": []}]', "the data of task None names no image"),
    ],
)
def test_damaged_files(write, content, message, tmp_path):
    path = write(tmp_path / "boxes")
    path.write_text(content)
    with pytest.raises(L2R2Error, match=message):
        read_boxes(path)


def test_an_empty_folder_says_which_formats_are_folders(tmp_path):
    with pytest.raises(L2R2Error, match=r"YOLO \(.txt\), Pascal VOC \(.xml\) or LabelMe \(.json\)"):
        read_boxes(tmp_path)


def test_supervision_detections():
    sv = pytest.importorskip("supervision")
    masks = np.zeros((2, 100, 200), dtype=bool)
    masks[0, 10:50, 20:60] = True
    made = sv.Detections(
        xyxy=np.array(BOXES), confidence=np.array([0.3, 0.9]), mask=masks, class_id=np.array([0, 1]), data={"class_name": LABELS}
    )
    found = Detections.from_supervision(made, SIZE)
    assert found.boxes.tolist() == [list(BOXES[1]), list(BOXES[0])] and found.labels == ("owl", "fox")
    assert found.masks[1].sum() == 1600
    assert len(Detections.from_supervision(sv.Detections.empty(), SIZE)) == 0
