"""`l2r2 benchmark`: what it counts; times are not tested."""

import json

import pytest
from conftest import sentence

from l2r2_models import L2R2Error, Predictor
from l2r2_models.predict.benchmark import STAGES, run_benchmark, synthetic_photos


def test_stages_views_and_failures_are_counted(run, tmp_path):
    inputs = synthetic_photos(tmp_path, 6, (80, 60), boxes=2)
    inputs.paths[3].write_bytes(b"no image")
    found = run_benchmark(Predictor.from_pretrained(run, device="cpu", batch_size=4), inputs, repeats=1)
    assert (found.images, found.objects) == (5, 10) and found.rows == 3.0  # each image once, each box once
    assert tuple(found.stages) == STAGES and all(seconds > 0 for seconds in found.stages.values())
    assert sum(found.shares().values()) == pytest.approx(1) and found.rate > 0 and found.plain > 0 and found.memory > 0


def test_a_localizer_and_files_that_are_no_images_are_refused(run, tmp_path):
    inputs = synthetic_photos(tmp_path, 2, (80, 60))
    with pytest.raises(L2R2Error, match="localizer"):
        run_benchmark(Predictor.from_pretrained(run, device="cpu", localizer="center"), inputs)
    for path in inputs.paths:
        path.write_bytes(b"no image")
    with pytest.raises(L2R2Error, match="can be read"):
        run_benchmark(Predictor.from_pretrained(run, device="cpu"), inputs)


def test_the_command(run, dataset, l2r2):
    done = l2r2("benchmark", run, dataset, "--limit", 4, "--repeats", 1, "--cascade", 0, "--no-plain", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["images"] == 4 and found["cascade"] == 0 and found["plain"] == 0
    done = l2r2("benchmark", run, "--limit", 2, "--size", "64x48", "--repeats", 1)
    assert done.returncode == 0 and "network" in done.stdout and "a plain timm network" in done.stdout
    assert l2r2("benchmark", run, "--size", "big").returncode == 2
    refused = l2r2("benchmark", run, "--skip-bad")
    assert refused.returncode == 2 and "--skip-bad" in refused.stderr


def test_a_profile_has_the_stages_and_the_operators(run, tmp_path, l2r2):
    done = l2r2("benchmark", run, "--limit", 3, "--size", "64x48", "--repeats", 1, "--profile", tmp_path / "trace.json")
    assert done.returncode == 0 and "convolution" in done.stdout and "trace.json" in done.stdout
    names = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("l2r2: decode") == 3 and {f"l2r2: {stage}" for stage in STAGES} <= set(names)
    nowhere = l2r2("benchmark", run, "--limit", 1, "--size", "64x48", "--repeats", 1, "--profile", "/dev/null/trace.json")
    assert "cannot be written" in sentence(nowhere)
