"""Composites of cut-out objects and scenes."""

import csv
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l2r2_cli.commands import main
from l2r2_models import L2R2Error
from l2r2_models.data.dataset import sample_of
from l2r2_models.data.spawrious import composites
from l2r2_models.data.table import read_table

CLASSES, KINDS = ("ant", "bee", "cat"), ("desert", "ocean", "park")
STUDIO = (0, 0, 255)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Objects: gray ellipses on a blue studio, three training and two test objects a class. Scenes: noise without blue."""
    root, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for folder in ("objects/images", "objects/masks", "scenes/images"):
        (root / folder).mkdir(parents=True)
    rows = []
    for label in CLASSES:
        for i in range(5):
            for view in range(4):
                name = f"{label}{i}_{view}.png"
                ys, xs = np.mgrid[:48, :64]
                mask = ((xs - 32) / 25) ** 2 + ((ys - 24) / (8 + 2 * view)) ** 2 < 1
                pixels = np.where(mask[..., None], 150 + 10 * i, np.array(STUDIO)).astype(np.uint8)
                Image.fromarray(pixels).save(root / "objects/images" / name)
                Image.fromarray((mask * 255).astype(np.uint8)).save(root / "objects/masks" / name)
                rows.append((f"images/{name}", label, "train" if i < 3 else "test", f"masks/{name}", f"{label}_{i}"))
    write(root / "objects", ("file_name", "label", "split", "mask_file", "object_instance"), rows)
    rows = []
    for kind in KINDS:
        for split, count in (("train", 10), ("test", 4)):
            for i in range(count):
                pixels = rng.integers(0, 100, (40, 50, 3), dtype=np.uint8)
                pixels[..., 2] = 0
                Image.fromarray(pixels).save(root / f"scenes/images/{kind}_{split}_{i}.png")
                rows.append((f"images/{kind}_{split}_{i}.png", kind, split))
    write(root / "scenes", ("file_name", "label", "split"), rows)
    return root / "objects", root / "scenes"


def write(folder, names, rows):
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    return composites(*sources, tmp_path_factory.mktemp("made") / "out", correlation=(0.75, 0.5), size=64)


def lines(folder):
    with open(folder / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}


def test_each_environment_has_its_correlation_exactly_and_the_tests_are_home_or_permuted(made):
    rows = lines(made)
    counts = Counter((r["split"], r["environment"]) for r in rows)
    assert counts[("train", "75%")] == counts[("train", "50%")] == counts[("test_id", "id")] == counts[("test_ood", "ood")] == 24
    assert counts[("val", "75%")] == counts[("val", "50%")] == 12 and len(rows) == 120
    home = {r["label"]: r["background"] for r in rows if r["split"] == "test_id"}
    away = {r["label"]: r["background"] for r in rows if r["split"] == "test_ood"}
    assert set(home.values()) == set(away.values()) == set(KINDS) and all(home[k] != away[k] for k in CLASSES)
    for split, environment, part in (("train", "75%", 0.75), ("train", "50%", 0.5), ("val", "75%", 0.75), ("val", "50%", 0.5)):
        for label in CLASSES:
            mine = [r["background"] for r in rows if (r["split"], r["environment"], r["label"]) == (split, environment, label)]
            assert mine.count(home[label]) == part * len(mine)
    for split, places in (("test_id", home), ("test_ood", away)):
        assert all(r["background"] == places[r["label"]] for r in rows if r["split"] == split)


def test_no_object_and_no_scene_is_on_both_sides(made):
    rows = lines(made)

    def values(column, *splits):
        return {r[column] for r in rows if r["split"] in splits}

    for column in ("object", "object_file", "scene_file"):
        train, val, test = values(column, "train"), values(column, "val"), values(column, "test_id", "test_ood")
        assert train and val and test and not (train & val or train & test or val & test)
    assert all("_test_" in name for name in values("scene_file", "test_id", "test_ood"))
    assert len(values("object", "val")) == len(CLASSES)


def test_box_and_mask_fit_the_object_and_nothing_of_the_studio_comes_along(made):
    table = read_table(made)
    sizes, places = set(), set()
    for row in table.rows:
        sample = sample_of(row, (0, 0, 0))
        ys, xs = sample.mask.nonzero().T
        assert sample.box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert sample.pixels.shape == (64, 64, 3)
        inner = sample.pixels[sample.mask].float()
        assert inner[:, 0].mean() > 120  # the ellipse is pale, scenes are dark
        assert (sample.pixels[..., 2].int() - sample.pixels[..., 0].int()).max() <= 25  # a blue rim would stand out
        sizes.add(int(sample.box[2] - sample.box[0]))
        places.add((int(sample.box[0]), int(sample.box[1])))
    assert min(sizes) <= 28 and max(sizes) >= 44 and len(places) > 50


def test_the_same_call_repeats_the_bytes_finishes_what_was_begun_and_another_is_refused(sources, made, tmp_path):
    again = composites(*sources, tmp_path / "again", correlation=(0.75, 0.5), size=64)
    assert contents(again) == contents(made)
    (again / "metadata.csv").unlink()
    gone = sorted((again / "images").iterdir())[::3]
    for path in gone:
        path.unlink()
    kept = sorted((again / "images").iterdir())[0]
    before = kept.stat().st_mtime_ns
    composites(*sources, again, correlation=(0.75, 0.5), size=64)
    assert contents(again) == contents(made) and kept.stat().st_mtime_ns == before
    with pytest.raises(L2R2Error, match="contains composites of other data or settings"):
        composites(*sources, again, correlation=(0.75, 0.5), size=64, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(L2R2Error, match="exists and contains no composites"):
        composites(*sources, tmp_path / "mine")


def test_a_killed_call_is_finished_by_the_same_one(sources, made, tmp_path):
    """The process dies between two images, without any chance to tidy up."""
    code = (
        "import os, sys; from l2r2_models.data.spawrious import composites\n"
        "def stop(items, total):\n"
        "    for i, item in enumerate(items):\n"
        "        if i == 20: os._exit(9)\n"
        "        yield item\n"
        "composites(*sys.argv[1:4], correlation=(0.75, 0.5), size=64, progress=stop)\n"
    )
    died = subprocess.run([sys.executable, "-c", code, *map(str, sources), str(tmp_path / "out")])
    assert died.returncode == 9 and not (tmp_path / "out" / "metadata.csv").exists()
    composites(*sources, tmp_path / "out", correlation=(0.75, 0.5), size=64)
    assert contents(tmp_path / "out") == contents(made)


def test_more_classes_than_scenes_share_homes_and_full_correlation_leaves_no_exception(sources, tmp_path):
    two = tmp_path / "two"
    shutil.copytree(sources[1], two)
    with open(two / "metadata.csv") as file:
        kept = [line for line in file if "park" not in line]
    (two / "metadata.csv").write_text("".join(kept))
    rows = lines(composites(sources[0], two, tmp_path / "out", correlation=(1.0,), size=32, val_objects=0))
    homes = {
        label: {r["background"] for r in rows if r["label"] == label and r["split"] in ("train", "test_id")} for label in CLASSES
    }
    assert all(len(kinds) == 1 for kinds in homes.values()) and set().union(*homes.values()) == {"desert", "ocean"}
    assert all(r["background"] not in homes[r["label"]] for r in rows if r["split"] == "test_ood")
    assert not [r for r in rows if r["split"] == "val"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"correlation": (1.2,)}, "correlation must be one or more numbers between 0 and 1"),
        ({"correlation": ()}, "correlation must be one or more"),
        ({"correlation": (0.9, 0.9)}, "correlation must be distinct numbers"),
        ({"size": 4}, "size must lie between 16 and 4096"),
        ({"copies": 0}, "copies must lie between"),
        ({"val_objects": 3}, "ant has only 3 training objects, too few to hold 3 out"),
        ({"object_column": "id"}, 'no column "id"'),
    ],
)
def test_settings_that_do_not_fit_are_named(sources, tmp_path, wrong, message):
    with pytest.raises(L2R2Error, match=message):
        composites(*sources, tmp_path / "out", **wrong)


def test_data_that_do_not_fit_are_named(sources, tmp_path):
    with pytest.raises(L2R2Error, match=r"ant0_0\.png has no mask_file"):
        bare = tmp_path / "bare"
        shutil.copytree(sources[0], bare)
        text = (bare / "metadata.csv").read_text()
        (bare / "metadata.csv").write_text(text.replace("mask_file", "other"))
        composites(bare, sources[1], tmp_path / "out")
    with pytest.raises(L2R2Error, match="no test scene of the kind park"):
        few = tmp_path / "few"
        shutil.copytree(sources[1], few)
        with open(few / "metadata.csv") as file:
            kept = [line for line in file if "park_test" not in line]
        (few / "metadata.csv").write_text("".join(kept))
        composites(sources[0], few, tmp_path / "out")


def test_the_command_makes_them_and_tells_how_many(sources, tmp_path, monkeypatch, capsys):
    def run(*options):
        arguments = ["composite", *map(str, sources), "-o", str(tmp_path / "out"), *options]
        monkeypatch.setattr(sys, "argv", ["l2r2", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    code, said = run("--correlation", "0.75", "--size", "32", "--copies", "2", "--val-objects", "1", "--seed", "3")
    assert code == 0 and "train 48, val 24, test_id 48, test_ood 48" in said.out
    assert Image.open(Path(tmp_path / "out" / lines(tmp_path / "out")[0]["file_name"])).size == (32, 32)
    code, said = run("--correlation", "high")
    assert code == 1 and '--correlation takes comma-separated numbers such as 0.97,0.87, got "high"' in said.err
    code, said = run("--object-column", "nothing")
    assert code == 1 and 'no column "nothing"' in said.err
