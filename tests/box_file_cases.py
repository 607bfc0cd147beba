"""A valid file of each box format, and the error for an invalid one."""

import json

import pytest

from l2r2_models.boxes import read_boxes
from l2r2_models.errors import L2R2Error

MEGADETECTOR = {
    "info": {"format_version": "1.6", "detector": "md_v5a.0.0"},
    "detection_categories": {"1": "animal", "2": "person"},
    "images": [
        {
            "file": "a/1.jpg",
            "detections": [
                {"category": "1", "conf": 0.9, "bbox": [0.25, 0.5, 0.5, 0.25]},
                {"category": "2", "conf": 0.95, "bbox": [0, 0, 1, 1]},
            ],
        },
        {"file": "a/2.jpg", "detections": []},
        {"file": "a/3.jpg", "failure": "Image access failure"},
        {"file": "a/4.jpg", "width": 400, "height": 200, "detections": []},
        {"file": "a/5.jpg", "detections": None, "failure": "Failure inference"},
    ],
}
SPECIESNET = {
    "predictions": [
        {
            "filepath": "s/1.jpg",
            "prediction": "x;y",
            "prediction_score": 0.7,
            "model_version": "4.0.0a",
            "detections": [
                {"category": "1", "label": "animal", "conf": 0.8, "bbox": [0.25, 0.5, 0.5, 0.25]},
                {"category": "2", "label": "human", "conf": 0.1, "bbox": [0, 0, 0.1, 0.1]},
            ],
        },
        {"filepath": "s/2.jpg", "failures": ["DETECTOR", "CLASSIFIER"]},
        {"filepath": "s/3.jpg", "failures": ["GEOLOCATION"], "detections": [{"label": "cat", "conf": 1, "bbox": [0, 0, 1, 1]}]},
        {"filepath": "s/4.jpg", "detections": []},
    ]
}
COCO = {
    "info": {},
    "licenses": [],
    "images": [{"id": 7, "file_name": "c/1.jpg", "width": 400, "height": 200}, {"id": "x", "file_name": "c/2.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [100, 100, 200, 50], "area": 10000, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 9, "bbox": [0.5, 0, 10, 10.25], "score": 0.25},
    ],
    "categories": [{"id": 3, "name": "cat"}],
}
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


def write_content(path, content):
    """Bytes and text as they are, a list as JSON lines where the suffix says so, everything else as JSON."""
    if isinstance(content, list) and path.suffix == ".jsonl":
        content = "\n".join(map(json.dumps, content))
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path):
    """The message with which a file is refused: one sentence that names it."""
    with pytest.raises(L2R2Error) as caught:
        read_boxes(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    return message
