"""`l2r2 localize`: the same box file after any interruption, and with any number of processes."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import sentence, write_run
from PIL import Image

from l2r2_models.boxes import read_boxes
from l2r2_models.errors import L2R2Error
from l2r2_models.images import list_images
from l2r2_models.localize import create_localizer
from l2r2_models.localize.localize_files import localize_to_file


def entries(path):
    return read_boxes(path).entries


def test_the_command_writes_megadetector_boxes_that_training_reads(l2r2, dataset, tmp_path):
    result = l2r2("localize", dataset / "images", "--localizer", "center?share=0.5", "-o", tmp_path / "boxes.json")
    assert result.returncode == 0 and "36 images: 36 with a box, 0 without; 0 failed" in result.stdout, result.stderr
    data = json.loads((tmp_path / "boxes.json").read_text())
    assert data["info"]["format_version"] == "1.6" and data["info"]["detector"] == "center"  # the default share is left out
    image = data["images"][0]
    assert (image["width"], image["height"]) == (60, 40) and image["detections"][0]["bbox"] == [0.25, 0.25, 0.5, 0.5]
    again = l2r2("localize", dataset / "images", "--localizer", "center", "-o", tmp_path / "boxes.json", "--json")
    assert json.loads(again.stdout)["from_before"] == 36
    assert l2r2("predict", "nobody/x", dataset, "--boxes", tmp_path / "boxes.json", "-o", tmp_path / "p.json").returncode == 1


@pytest.mark.parametrize("name", ["boxes.json", "boxes.parquet", "coco.json"])
def test_a_file_continues_with_new_images_and_repeats_only_failures(tmp_path, dataset, name, monkeypatch):
    paths, out = list_images([dataset / "images"]), tmp_path / name
    format = "coco" if name == "coco.json" else "megadetector"
    good = paths[3].read_bytes()
    paths[3].write_text("not an image")
    localizer = create_localizer("center?share=0.3")
    report = localize_to_file(localizer, paths[:20], out, format=format)
    assert list(report.failures) == [str(paths[3])] and "not an image" in report.failures[str(paths[3])]
    paths[3].write_bytes(good)
    seen, find = [], type(localizer).find
    monkeypatch.setattr(type(localizer), "find", lambda self, i, names, p: seen.extend(names) or find(self, i, names, p))
    report = localize_to_file(localizer, paths, out, format=format, batch_size=5)
    assert seen == [str(paths[3]), *map(str, paths[20:])] and report.kept == 19 and not report.failures
    localize_to_file(localizer, paths, tmp_path / f"fresh-{name}", format=format)
    assert entries(out) == entries(tmp_path / f"fresh-{name}") and list(entries(out)) == [str(p) for p in paths]
    assert not list(tmp_path.glob("*.parts"))


def test_a_file_of_another_localizer_or_of_others_is_refused(l2r2, dataset, tmp_path):
    def again(spec, *more):
        return sentence(l2r2("localize", dataset, "--localizer", spec, "-o", tmp_path / "boxes.json", *more))

    (tmp_path / "boxes.json").write_text('{"a.png": [[1, 2, 3, 40]]}')
    assert "was not made by `l2r2 localize`" in again("center")
    (tmp_path / "boxes.json").unlink()
    assert l2r2("localize", dataset, "--localizer", "center", "-o", tmp_path / "boxes.json").returncode == 0
    assert "was made with another localizer, center" in again("center?share=0.4")
    assert "takes no prompt" in again("full", "--oracle-prompts") or "another localizer" in again("full")
    (tmp_path / "b.json").mkdir()
    assert "b.json" in sentence(l2r2("localize", dataset, "--localizer", "full", "-o", tmp_path / "b.json"))
    (tmp_path / "plain").write_text("")
    out = tmp_path / "plain" / "boxes.json"
    assert "cannot be written" in sentence(l2r2("localize", dataset, "--localizer", "full", "-o", out))


def test_what_cannot_be_written_is_reported_before_the_work(tmp_path, dataset):
    def refused(name, **how):
        with pytest.raises(L2R2Error) as error:
            localize_to_file(create_localizer("full"), list_images([dataset]), tmp_path / name, **how, progress=None)
        assert not list(tmp_path.glob(f"{name}*"))
        return str(error.value)

    assert "must end in .json or .parquet" in refused("x.csv")
    assert 'Unknown box format "nope"' in refused("x.json", format="nope")
    assert 'Unknown box format "parquet" for a .json' in refused("x.json", format="parquet")


def test_one_image_under_two_paths_is_predicted_once(tmp_path, dataset, monkeypatch):
    monkeypatch.chdir(dataset)
    localizer, out = create_localizer("full"), tmp_path / "boxes.json"
    relative, absolute = list_images(["images"]), list_images([dataset / "images"])
    localize_to_file(localizer, relative[:30], out)
    report = localize_to_file(localizer, absolute, out)
    assert report.kept == 30 and list(entries(out)) == list(map(str, absolute))
    both = localize_to_file(localizer, [*absolute[:2], *relative[:2]], out)  # in one call they are two
    assert list(both.entries) == list(map(str, [*absolute[:2], *relative[:2]])) and len(entries(out)) == 38


def test_of_a_changed_box_file_only_what_changed_is_done_again(tmp_path, dataset):
    source, out, paths = tmp_path / "given.json", tmp_path / "boxes.json", list_images([dataset / "images"])
    source.write_text(json.dumps({p.name: [[1, 2, 30, 40]] for p in paths[:-1]}))
    report = localize_to_file(create_localizer(f"boxes:{source}"), paths, out)
    assert report.with_box == 35 and not report.failures
    source.write_text(json.dumps({p.name: [[1, 2, 30, 40 if i else 39]] for i, p in enumerate(paths)}))
    report = localize_to_file(create_localizer(f"boxes:{source}"), paths, out)
    assert report.kept == 34 and report.with_box == 36  # one box moved, one is new
    assert entries(out)[str(paths[0])].boxes[0][3] == pytest.approx(39 / 40)


@pytest.mark.parametrize("name", ["boxes.json", "boxes.parquet", "coco.json"])
def test_a_changed_photo_is_predicted_again(tmp_path, dataset, name):
    paths, out, how = list_images([dataset / "images"]), tmp_path / name, {"format": "coco"} if name[0] == "c" else {}
    localize_to_file(create_localizer("full"), paths, out, **how)
    Image.new("RGB", (30, 20)).save(paths[5])
    report = localize_to_file(create_localizer("full"), paths, out, **how)
    assert report.kept == 35 and report.entries[str(paths[5])].image_size == (20, 30)


def test_boxes_that_are_not_finite_are_the_failure_of_their_image(tmp_path, dataset, monkeypatch):
    paths, localizer = list_images([dataset / "images"]), create_localizer("full")
    find, bad = type(localizer).find, str(paths[4])

    def broken(self, images, names, prompts):
        found = zip(names, find(self, images, names, prompts))
        return [replace(d, boxes=d.boxes * float("nan")) if name == bad else d for name, d in found]

    monkeypatch.setattr(type(localizer), "find", broken)
    report = localize_to_file(localizer, paths, tmp_path / "boxes.json")
    assert list(report.failures) == [bad] and "not finite" in report.failures[bad] and report.with_box == 35


def test_a_name_that_parquet_cannot_hold_is_refused_before_the_work(tmp_path, dataset):
    odd = dataset / "images" / os.fsdecode(b"caf\xe9.png")
    (dataset / "images" / "train_000.png").rename(odd)
    paths = list_images([dataset / "images"])
    with pytest.raises(L2R2Error, match=r"not UTF-8; rename it, or write \.json"):
        localize_to_file(create_localizer("full"), paths, tmp_path / "boxes.parquet", progress=None)
    kept = [localize_to_file(create_localizer("full"), paths, tmp_path / "boxes.json").kept for _ in range(2)]
    assert kept == [0, 36] and str(odd) in entries(tmp_path / "boxes.json")


def test_a_batch_that_fails_is_tried_one_by_one(tmp_path, dataset, monkeypatch):
    paths, localizer = list_images([dataset / "images"]), create_localizer("full")
    bad, find = str(paths[4]), type(localizer).find

    def fails(self, images, names, prompts):
        if bad in names:
            raise RuntimeError("out of\nmemory")
        return find(self, images, names, prompts)

    monkeypatch.setattr(type(localizer), "find", fails)
    report = localize_to_file(localizer, paths, tmp_path / "boxes.json")
    assert report.failures == {bad: "out of memory"} and report.with_box == 35


def test_an_interruption_keeps_what_is_done(tmp_path, dataset):
    paths, out, localizer = list_images([dataset / "images"]), tmp_path / "boxes.json", create_localizer("full")

    def dies(batches, total):
        for i, batch in enumerate(batches):
            if i == 3:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        localize_to_file(localizer, paths, out, batch_size=5, progress=dies)
    with pytest.raises(L2R2Error, match=r"boxes.json.parts: was made with another localizer"):
        localize_to_file(create_localizer("center"), paths, out)
    assert localize_to_file(localizer, paths, out).kept == 15


def test_killed_at_a_random_moment_the_same_command_gives_the_same_file(tmp_path, dataset):
    paths, localizer = list_images([dataset / "images"]), create_localizer("center?share=0.7")
    localize_to_file(localizer, paths, tmp_path / "whole.json")
    out, parts, wanted = tmp_path / "killed.json", tmp_path / "killed.json.parts", random.randrange(1, 34)
    command = ["localize", dataset / "images", "--localizer", "center?share=0.7", "--batch-size", 1, "-o", out]
    process = subprocess.Popen([sys.executable, "-m", "l2r2_models", *map(str, command)], stdout=subprocess.DEVNULL)
    while process.poll() is None and sum(len(part.read_bytes().splitlines()) for part in parts.glob("part-*")) <= wanted:
        time.sleep(0.001)
    process.kill()
    process.wait()
    if not parts.exists():
        pytest.skip(f"the process was through before it was seen to have {wanted} images")  # fast machines only
    (part,) = parts.glob("part-*")
    part.write_bytes(part.read_bytes() + b'{"file": "half')  # as a kill in the middle of a line leaves it
    assert localize_to_file(localizer, paths, out).kept >= wanted
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert [file for file in tmp_path.iterdir() if file.name.startswith(("killed", ".killed"))] == [out]


def test_two_processes_share_the_work_and_give_the_file_of_one(tmp_path, dataset):
    arguments = ["localize", dataset / "images", "--localizer", "center?share=0.7", "--batch-size", "4", "-o"]
    paths = list_images([dataset / "images"])
    localize_to_file(create_localizer("center?share=0.7"), paths, tmp_path / "one.json", batch_size=4)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "l2r2_models"]
    (dataset / "images" / "zz.png").write_text("bad")
    result = subprocess.run(
        [sys.executable, *torchrun, *arguments, tmp_path / "two.json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "37 images: 36 with a box, 0 without; 1 failed" in result.stdout, result.stderr
    assert result.returncode != 0 and result.stdout.count("wrote") == 1
    two = entries(tmp_path / "two.json")
    bad = two.pop(str(dataset / "images" / "zz.png"))
    assert two == entries(tmp_path / "one.json") and "not an image" in bad.failure


def test_oracle_prompts_are_marked_wherever_the_boxes_go(l2r2, run, dataset, tmp_path, tiny, caplog):
    out, spec = tmp_path / "boxes.json", f"owlv2:{tiny('owlv2')}?threshold=0"
    result = l2r2("localize", dataset, "--split", "test", "--localizer", spec, "--oracle-prompts", "-o", out)
    assert result.returncode == 0, result.stderr
    data = json.loads(out.read_text())
    assert data["info"]["l2r2"]["oracle"] and set(data["detection_categories"].values()) == {"red", "green", "blue", "object"}
    read_boxes(out)
    assert "each image's true label as prompt (oracle)" in caplog.text
    for source in (["--boxes", out], ["--localizer", f"boxes:{out}"]):
        predicted = tmp_path / f"{source[0]}.json"
        assert l2r2("predict", run, dataset, "--split", "test", *source, "-o", predicted).returncode == 0
        assert json.loads(predicted.read_text())["oracle"] is True
    judged = l2r2("evaluate", write_run(tmp_path / "run"), dataset, "--boxes", out, "--report", tmp_path / "r.html")
    told = "found with each image's true label as prompt"
    assert "(the true labels were the prompts)" in judged.stdout and told in judged.stderr
    assert "true label as prompt" in (tmp_path / "r.html").read_text()
    (kept,) = (tmp_path / "run" / "evaluations").iterdir()
    assert any(told in warning for warning in json.loads(kept.read_text())["warnings"])
    plain = f"{spec}&prompt=red"
    l2r2("localize", dataset, "--localizer", plain, "-o", tmp_path / "plain.json")
    l2r2("predict", run, dataset, "--boxes", tmp_path / "plain.json", "-o", tmp_path / "plain-predicted.json")
    assert "oracle" not in json.loads((tmp_path / "plain-predicted.json").read_text())
    again = l2r2("localize", dataset, "--localizer", plain, "--oracle-prompts", "-o", tmp_path / "plain.json")
    assert "was made without the true labels as prompts" in sentence(again)
    folder = l2r2("localize", dataset / "images", "--localizer", spec, "--oracle-prompts", "-o", tmp_path / "x.json")
    assert "needs a label for every image" in sentence(folder)


def test_a_prompt_on_the_command_line_is_part_of_the_spec(l2r2, dataset, tmp_path, tiny):
    out = tmp_path / "boxes.json"
    base = ["localize", dataset, "--localizer", f"owlv2:{tiny('owlv2')}", "-o", out]
    assert l2r2(*base, "--prompt", "red", "--prompt", "a bird").returncode == 0
    assert read_boxes(out).info["localizer"] == f"owlv2:{tiny('owlv2')}?prompt=red&prompt=a bird"
    assert "another localizer" in sentence(l2r2(*base, "--prompt", "red"))
    without = ["localize", dataset, "--localizer", "", "-o", tmp_path / "without.json"]
    for spec in (f"owlv2:{tiny('owlv2')}", f"owlv2:{tiny('owlv2')}?masks=sam:{tiny('sam')}"):
        without[3] = spec
        assert "needs a prompt" in sentence(l2r2(*without))
        assert not list(tmp_path.glob("without*"))  # nothing that would be in the way of the command with a prompt
    assert l2r2(*without[:3], f"owlv2:{tiny('owlv2')}?score=objectness", *without[4:]).returncode == 0
