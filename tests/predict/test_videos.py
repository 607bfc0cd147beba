"""MegaDetector's output for videos: frames extracted, classified, and written back as videos."""

import json
import struct
from pathlib import Path

import pytest
from conftest import sentence
from PIL import Image

from l2r2_models import L2R2Error, Predictor
from l2r2_models.boxes import read_boxes
from l2r2_models.images import load_image
from l2r2_models.predict.fuse_again import fuse_again
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.predict.videos import extract_frames

av = pytest.importorskip("av")
import numpy as np  # noqa: E402

TURN = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # display matrix: clockwise by 90 degrees


def write_video(path, frames=6, width=64, height=48):
    """Frame k has the gray level 30 k; the top left quarter is white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        for k in range(frames):
            pixels = np.full((height, width, 3), 30 * k, dtype=np.uint8)
            pixels[: height // 2, : width // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def detection(number, conf=0.9, category="7"):
    return {"category": category, "conf": conf, "bbox": [0.25, 0.5, 0.5, 0.5], "frame_number": number}


@pytest.fixture
def videos(tmp_path):
    for name in ("site/a.mp4", "site/b.mp4"):
        write_video(tmp_path / "videos" / name)
    images = [
        {"file": "site/a.mp4", "frame_rate": 5, "frames_processed": [0, 2, 4], "detections": [detection(4), detection(2)]},
        {"file": "site/b.mp4", "frame_rate": 5.5, "frames_processed": [1, 3], "detections": []},
    ]
    boxes = {"info": {"format_version": "1.6"}, "detection_categories": {"1": "animal", "7": "drone"}, "images": images}
    (tmp_path / "md.json").write_text(json.dumps(boxes))
    return tmp_path / "videos"


def extracted(videos, tmp_path):
    return extract_frames([videos], read_boxes(tmp_path / "md.json"), tmp_path / "frames")


def test_the_listed_frames_are_extracted_and_no_other(videos, tmp_path):
    names = [str(path.relative_to(tmp_path / "frames")) for path in extracted(videos, tmp_path)]
    assert names == ["site/a.mp4/frame000002.jpg", "site/a.mp4/frame000004.jpg", "site/b.mp4/frame000001.jpg"]
    for name, level in zip(names, (60, 120, 30)):
        assert load_image(tmp_path / "frames" / name).getpixel((60, 40))[0] == pytest.approx(level, abs=12)


def test_sources_that_are_no_videos_are_kept(videos, tmp_path):
    (videos / "mixed").mkdir()
    (videos / "mixed" / "a.jpg").touch()
    (videos / "site" / "a.mp4").rename(videos / "mixed" / "a.mp4")
    others = [videos / "mixed", tmp_path / "misspelled", "hf:org/photos"]
    sources = [videos / "site", *map(Path, others)]
    images = json.loads((tmp_path / "md.json").read_text().replace("site/a.mp4", "mixed/a.mp4"))
    (tmp_path / "md.json").write_text(json.dumps(images))
    kept = extract_frames(sources, read_boxes(tmp_path / "md.json"), tmp_path / "frames")
    assert kept[:3] == sources[1:] and all(tmp_path / "frames" in path.parents for path in kept[3:]) and len(kept) == 6


def test_frames_that_exist_are_kept(videos, tmp_path):
    first, *_ = extracted(videos, tmp_path)
    first.write_bytes(b"mine")
    (videos / "site" / "b.mp4").write_bytes(b"")  # not opened again
    extracted(videos, tmp_path)
    assert first.read_bytes() == b"mine"


def test_frames_are_upright(videos, tmp_path):
    video = videos / "site" / "a.mp4"
    data = video.read_bytes()
    start = data.index(b"tkhd") + 4 + 40
    video.write_bytes(data[:start] + TURN + data[start + 36 :])
    image = load_image(extracted(videos, tmp_path)[0])
    assert image.size == (48, 64)
    assert image.getpixel((40, 5))[0] > 200 > image.getpixel((5, 5))[0]  # the white quarter is at the top right now


def test_videos_are_written_back_with_their_frame_numbers(videos, tmp_path, run):
    inputs = gather(extracted(videos, tmp_path), tmp_path / "md.json")
    out = tmp_path / "out.json"
    predict_to_file(Predictor.from_pretrained(run, device="cpu"), inputs, out, format="megadetector")
    data = json.loads(out.read_text())
    assert data["detection_categories"] == {"1": "animal", "7": "drone"}
    a, b = data["images"]
    assert (a["file"], a["frame_rate"], a["frames_processed"]) == ("site/a.mp4", 5, [2, 4])
    assert b == {"file": "site/b.mp4", "frame_rate": 5.5, "frames_processed": [1], "detections": []}
    assert [(d["frame_number"], d["category"], d["bbox"]) for d in a["detections"]] == [
        (number, "7", [0.25, 0.5, 0.5, 0.5]) for number in (2, 4)
    ]
    assert all(d["classifications"] for d in a["detections"])
    again = read_boxes(out)  # what we write, we read
    assert set(again.frames) == {f"site/a.mp4/frame00000{n}.jpg" for n in (2, 4)} | {"site/b.mp4/frame000001.jpg"}


def test_predictions_that_are_fused_again_keep_videos_names_and_category_ids(videos, tmp_path, run):
    frames, predictor = extracted(videos, tmp_path), Predictor.from_pretrained(run, device="cpu")
    data = json.loads((tmp_path / "md.json").read_text())
    data["info"]["detector"] = "md_v1000"
    Image.new("RGB", (40, 30)).save(tmp_path / "frames" / "still.jpg")
    data["images"].append({"file": "still.jpg", "detections": [{"category": "1", "conf": 0.9, "bbox": [0.1, 0.1, 0.5, 0.5]}]})
    (tmp_path / "md.json").write_text(json.dumps(data))
    inputs = gather([tmp_path / "frames"], tmp_path / "md.json")
    assert len(inputs.paths) == len(frames) + 1
    logits, direct, again = (tmp_path / f"{name}.json" for name in ("logits", "direct", "again"))
    predict_to_file(predictor, inputs, logits, store_logits=True)
    predict_to_file(predictor, inputs, direct, format="megadetector")
    fuse_again(logits, again, run=str(run), format="megadetector")
    expected, found = (json.loads(path.read_text()) for path in (direct, again))
    for one in (o for data in (expected, found) for image in data["images"] for o in image["detections"]):
        one["classifications"] = [number for number, _ in one["classifications"]]
    assert found["images"] == expected["images"] and len(found["images"]) == 3
    assert found["detection_categories"] == expected["detection_categories"] == {"1": "animal", "7": "drone"}
    assert found["info"]["detector"] == expected["info"]["detector"] == "md_v1000"
    fuse_again(logits, tmp_path / "twice.json", run=str(run))  # and our JSON keeps them too
    fused, stored = (json.loads(path.read_text()) for path in (tmp_path / "twice.json", logits))
    assert fused["inputs"] == stored["inputs"] and [i.get("frame") for i in fused["images"]] == [
        i.get("frame") for i in stored["images"]
    ]


def test_the_command_takes_patterns_of_videos_and_reads_the_box_file_once(videos, tmp_path, run, l2r2, monkeypatch):
    read, original = [], read_boxes

    def watched(path):
        read.append(path)
        return original(path)

    monkeypatch.setattr("l2r2_models.boxes.read_boxes", watched)
    monkeypatch.setattr("l2r2_models.predict.inputs.read_boxes", watched)
    boxes, out = ("--boxes", tmp_path / "md.json"), tmp_path / "out.json"
    for pattern in (videos / "site" / "*.mp4", videos / "**" / "a.mp4"):
        result = l2r2("predict", run, pattern, *boxes, "--frames", tmp_path / "frames", "-o", out, "--format", "megadetector")
        assert result.returncode == 0, result.stderr
    assert [image["file"] for image in json.loads(out.read_text())["images"]] == ["site/a.mp4", "site/b.mp4"]
    assert len(read) == 2  # once per call
    without = l2r2("predict", run, videos / "site" / "*.mp4", *boxes, "-o", tmp_path / "other.json")
    assert "no image and no folder matches this pattern; for videos, pass --frames FOLDER" in sentence(without)


def test_another_frame_rate_of_the_same_file_is_written(videos, tmp_path, run):
    frames, predictor, out = extracted(videos, tmp_path), Predictor.from_pretrained(run, device="cpu"), tmp_path / "out.json"
    for rate in (5, 25):
        data = json.loads((tmp_path / "md.json").read_text())
        data["images"][0]["frame_rate"] = rate
        (tmp_path / "md.json").write_text(json.dumps(data))
        predict_to_file(predictor, gather(frames, tmp_path / "md.json"), out, format="megadetector")
        assert json.loads(out.read_text())["images"][0]["frame_rate"] == rate


def test_a_video_fails_only_if_all_its_frames_do(videos, tmp_path, run):
    frames = extracted(videos, tmp_path)
    frames[0].write_bytes(b"x")
    frames[2].write_bytes(b"x")
    out = tmp_path / "out.json"
    predict_to_file(
        Predictor.from_pretrained(run, device="cpu"), gather(frames, tmp_path / "md.json"), out, format="megadetector"
    )
    a, b = json.loads(out.read_text())["images"]
    assert a["frames_processed"] == [4] and [d["frame_number"] for d in a["detections"]] == [4]
    assert b["detections"] is None and "frame000001.jpg" in b["failure"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data["images"][0]["detections"].append(detection(99)), "a.mp4: has no frame 99"),
        (lambda data: data["images"][0]["detections"].append(detection(-1)), "frame number -1 of site/a.mp4"),
        (lambda data: data["images"][0].pop("frame_rate"), "the frame_rate of site/a.mp4"),
        (lambda data: data.update(detection_categories=[], images=[]), "looks like MegaDetector, but is malformed"),
        (lambda data: data.update(images=[{"file": "a.jpg", "detections": []}]), "lists no frames of videos"),
    ],
)
def test_bad_video_files(videos, tmp_path, change, message):
    data = json.loads((tmp_path / "md.json").read_text())
    change(data)
    (tmp_path / "md.json").write_text(json.dumps(data))
    with pytest.raises(L2R2Error, match=message):
        extracted(videos, tmp_path)


def test_bad_videos(videos, tmp_path):
    (videos / "site" / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(L2R2Error, match=r"a\.mp4: cannot be read as a video"):
        extracted(videos, tmp_path)
    with pytest.raises(L2R2Error, match="no video"):
        extract_frames([tmp_path / "md.json"], read_boxes(tmp_path / "md.json"), tmp_path / "frames")
