"""`l2r2 evaluate-boxes`: metrics compared with a naive loop, misses and failures counted apart, the worst images drawn."""

import json

import pytest
import torch
from conftest import sentence
from PIL import Image

from l2r2_models.boxes import BoxEntry, BoxTable, write_boxes
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.localization import draw_worst, evaluate_boxes
from l2r2_models.localize import create_localizer
from l2r2_models.localize.localize_files import localize_to_file


def overlap(a, b):
    """IoU and recall of b in a, counted pixel by pixel."""

    def pixels(box):
        return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}

    a, b = pixels(a), pixels(b)
    return len(a & b) / len(a | b), len(a & b) / len(a)


def test_the_metrics_are_those_of_counting_pixels(dataset, tmp_path):
    torch.manual_seed(0)
    rows = read_table(dataset).rows
    entries, ious, recalls = {}, [], []
    for i, row in enumerate(rows):
        x, y = torch.randint(-6, 6, (2,)).tolist()
        x0, y0, x1, y1 = row.entry.boxes[0]
        box = (max(0, x0 + x), max(0, y0 + y), min(60, x1 + x + 3), min(40, y1 + y))
        scores = (0.9, 0.1) if i % 5 else (0.1, 0.05)  # every fifth is unsure: a miss
        entries[str(row.path)] = BoxEntry((box, (0, 0, 60, 40)), scores, ("", ""), image_size=(40, 60))
        iou, recall = overlap(row.entry.boxes[0], box) if i % 5 else (0.0, 0.0)
        ious.append(iou)
        recalls.append(recall)
    write_boxes(BoxTable(entries), tmp_path / "boxes.json")
    report = evaluate_boxes(tmp_path / "boxes.json", dataset)
    assert report.images == 36 and report.missed == 8 and report.failed == report.unlisted == 0
    assert report.mean_iou == pytest.approx(sum(ious) / 36, abs=1e-6)
    assert report.area_recall == pytest.approx(sum(recalls) / 36, abs=1e-6)
    assert report.corloc == pytest.approx(sum(iou >= 0.5 for iou in ious) / 36)
    assert report.corloc_interval[0] < report.corloc < report.corloc_interval[1]
    assert sum(report.histogram) == 36 and report.histogram[0] >= 8
    assert report.quantiles["0.5"] == pytest.approx(torch.tensor(ious).quantile(0.5).item(), abs=1e-6)
    assert [one.iou for one in report.judged] == sorted(one.iou for one in report.judged)


def test_given_boxes_are_perfect_and_the_whole_image_holds_every_object(l2r2, dataset, tmp_path):
    for spec, corloc, recall in ((f"boxes:{dataset / 'metadata.csv'}", 1.0, 1.0), ("full", 0.0, 1.0)):
        out = tmp_path / "boxes.json"
        out.unlink(missing_ok=True)
        localize_to_file(create_localizer(spec), [row.path for row in read_table(dataset).rows], out)
        result = l2r2("evaluate-boxes", out, dataset, "--split", "test", "--json")
        figures = json.loads(result.stdout)
        assert figures["images"] == 12 and figures["localizer"] == spec
        assert figures["corloc"] == corloc and figures["area_recall"] == pytest.approx(recall, abs=1e-4)


def test_failures_strangers_and_images_without_an_object_are_told_apart(dataset, tmp_path):
    rows = read_table(dataset).of_split("test").rows
    names = [str(row.path) for row in rows]
    text = (dataset / "metadata.csv").read_text().splitlines()
    kept = [
        line if "test_000" not in line and "test_001" not in line else ",".join([*line.split(",")[:3], "", "", "", ""])
        for line in text
    ]
    (dataset / "metadata.csv").write_text("\n".join(kept))
    entries = {n: BoxEntry(((0, 0, 9, 9),), (1.0,), ("",), image_size=(40, 60)) for n in names[:-1]}
    entries[names[1]], entries[names[2]] = BoxEntry(image_size=(40, 60)), BoxEntry(failure="out of memory")
    (dataset / "images" / "test_003.png").write_text("no image")
    write_boxes(BoxTable(entries), tmp_path / "boxes.json")
    report = evaluate_boxes(tmp_path / "boxes.json", dataset, split="test")
    assert (report.images, report.missed, report.failed, report.unlisted) == (9, 2, 1, 1)
    assert (report.empty, report.false_boxes) == (2, 1) and list(report.unreadable) == [names[3]]


def test_with_a_mask_recall_counts_its_pixels(dataset, tmp_path):
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 10, 30, 20))
    mask.paste(255, (10, 20, 15, 30))  # an L: 250 pixels
    mask.save(dataset / "mask.png")
    (dataset / "metadata.csv").write_text("file_name,label,mask_file\nimages/train_000.png,red,mask.png\n")
    (tmp_path / "boxes.json").write_text(json.dumps({"train_000.png": [[10, 10, 30, 20]]}))
    report = evaluate_boxes(tmp_path / "boxes.json", dataset)
    assert report.area_recall == pytest.approx(200 / 250) and report.mean_iou == pytest.approx(0.5)


def test_the_worst_are_drawn_with_both_boxes(l2r2, dataset, tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps({row.path.name: [[40, 25, 60, 40]] for row in read_table(dataset).rows}))
    result = l2r2("evaluate-boxes", tmp_path / "boxes.json", dataset, "--pictures", tmp_path / "worst.png")
    assert result.returncode == 0 and "CorLoc@0.5" in result.stdout and "wrote" in result.stdout, result.stderr
    sheet = Image.open(tmp_path / "worst.png").convert("RGB")
    colors = {color for _, color in sheet.getcolors(1 << 20)}
    assert sheet.size == (5 * 260, 2 * 290) and {(0x16, 0xA3, 0x4A), (0xDC, 0x26, 0x26)} <= colors
    report = evaluate_boxes(tmp_path / "boxes.json", dataset, split="test")
    draw_worst(report, tmp_path / "few.png", count=2)
    assert Image.open(tmp_path / "few.png").size == (520, 290)


def test_boxes_that_cannot_be_evaluated_are_refused(l2r2, dataset, tmp_path):
    (tmp_path / "boxes.json").write_text('{"elsewhere.png": [[1, 2, 30, 40]]}')
    assert "none of its 1 entries" in sentence(l2r2("evaluate-boxes", tmp_path / "boxes.json", dataset))
    (tmp_path / "boxes.json").write_text('{"train_000.png": [[1, 2, 30, 40]]}')
    (dataset / "metadata.csv").write_text("file_name,label\nimages/train_000.png,red\n")
    assert "no image has a true box" in sentence(l2r2("evaluate-boxes", tmp_path / "boxes.json", dataset))
