"""Exports to OpenVINO, run and compared with PyTorch, and to Core ML, whose file is only read where there is no macOS."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import COLORS, sentence, write_run
from PIL import Image

from l2r2_models import L2R2Error, Predictor, ViewSpec
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.checkpoints import export, export_formats
from l2r2_models.checkpoints.export_formats import FORMATS


@pytest.fixture(scope="module")
def openvino():
    return pytest.importorskip("openvino", reason='needs OpenVINO: pip install "l2r2-models[openvino]"')


@pytest.fixture(scope="module")
def coremltools():
    return pytest.importorskip("coremltools", reason='needs Core ML Tools: pip install "l2r2-models[coreml]"')


def compiled(openvino, file):
    return openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def names_of(ports):
    return [port.any_name for port in ports]


def test_openvino_of_views_at_any_batch_size(tmp_path, openvino, run):
    result = export.export_run(run, tmp_path / "model.xml")
    assert result.difference <= 1e-4 and sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    network, model = compiled(openvino, result.file), hub.load_checkpoint(run).model
    assert names_of(network.inputs) == list(result.inputs) and names_of(network.outputs) == list(result.outputs)
    for batch in (1, 5):
        views, has_fg = {b: torch.randn(batch, 3, 32, 32) for b in model.branches}, torch.arange(batch) % 2 == 0
        with torch.inference_mode():
            wanted = model.forward_views(has_fg=has_fg, **views)
        got = network({**{f"{b}_view": v.numpy() for b, v in views.items()}, "has_fg": has_fg.numpy()})
        for name in result.outputs:
            torch.testing.assert_close(torch.from_numpy(got[name]), getattr(wanted, name), atol=1e-4, rtol=0)
    metadata = openvino.Core().read_model(str(result.file)).get_rt_info("framework").value
    assert json.loads(metadata["labels"]) == sorted(COLORS)
    assert ViewSpec.from_dict(json.loads(metadata["view_spec"])) == model.view_spec


@pytest.mark.slow
def test_openvino_of_an_image_and_its_boxes_predicts_as_predict(tmp_path, openvino, run):
    network = compiled(openvino, export.export_run(run, tmp_path / "model.xml", takes="image").file)
    predictor = Predictor.from_pretrained(run, device="cpu").keeping_logits()
    for size, box in (((64, 48), [4.0, 4, 40, 40]), ((33, 91), [5.5, 20, 30, 80])):
        photo = Image.effect_noise(size, 90).convert("RGB")
        logits = predictor(photo, [box]).objects[0].logits
        got = network({"image": np.asarray(photo), "boxes": np.float32([box])})
        for branch, wanted in logits.items():
            assert got[branch][0] == pytest.approx(wanted, abs=1e-4)
    got = network({"image": np.asarray(photo), "boxes": np.full((1, 4), np.nan, np.float32)})
    assert not got["has_fg"][0] and np.array_equal(got["fused"], got["full"])


@pytest.mark.slow
def test_openvino_in_half_precision_is_half_the_size(tmp_path, openvino, run):
    result = export.export_run(run, tmp_path / "model.xml", fp16=True)
    assert 0 < result.difference < 0.05
    assert (tmp_path / "model.bin").stat().st_size < 0.55 * (run / "model.safetensors").stat().st_size
    assert {port.element_type.to_string() for port in compiled(openvino, result.file).outputs} == {"f32"}


@pytest.mark.slow
def test_openvino_reads_a_model_that_finds_parts(tmp_path, openvino):
    """OpenVINO crashed on a scatter with no indices, that of the dropped parts."""
    import timm

    small = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_parts": 3}
    hub.save_checkpoint(timm.create_model("ifam_vit_tiny_patch16_224", num_classes=3, **small), tmp_path / "run", sorted(COLORS))
    assert export.export_run(tmp_path / "run", tmp_path / "model.xml").difference <= 1e-4


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def writer(monkeypatch, suffix, contents):
    """A format whose writer writes files of these contents, by ending, and returns the answers of PyTorch."""

    def write(module, inputs, file, metadata):
        for ending, content in contents.items():
            file.with_suffix(ending).write_text(content)
        return lambda values: module(*values)

    monkeypatch.setitem(FORMATS, suffix, export_formats.Format("a test", write))


def test_two_files_replace_two_files_or_none(tmp_path, run, monkeypatch):
    writer(monkeypatch, ".xml", {".xml": "graph", ".bin": "weights"})
    export.export_run(run, tmp_path / "model.xml")
    assert files_in(tmp_path) == {"model.xml": b"graph", "model.bin": b"weights"}
    writer(monkeypatch, ".xml", {".xml": "new graph", ".bin": "new weights"})
    with monkeypatch.context() as patch, pytest.raises(L2R2Error, match=r"not written, because .* differs"):
        patch.setitem(export.TOLERANCE, False, -1.0)
        export.export_run(run, tmp_path / "model.xml")
    assert files_in(tmp_path) == {"model.xml": b"graph", "model.bin": b"weights"}
    export.export_run(run, tmp_path / "model.xml")
    assert files_in(tmp_path) == {"model.xml": b"new graph", "model.bin": b"new weights"}


def test_weights_of_something_else_are_not_replaced(tmp_path, run, monkeypatch):
    writer(monkeypatch, ".xml", {".xml": "graph", ".bin": "weights"})
    (tmp_path / "pytorch_model.bin").write_text("mine")
    with pytest.raises(L2R2Error, match=r"pytorch_model\.bin: exists without pytorch_model\.xml; move it"):
        export.export_run(run, tmp_path / "pytorch_model.xml")
    assert files_in(tmp_path) == {"pytorch_model.bin": b"mine"}


def test_a_run_that_holds_its_own_export_can_still_be_loaded(tmp_path, monkeypatch):
    """The ending .bin is that of pickled weights, with which no checkpoint is loaded."""
    writer(monkeypatch, ".xml", {".xml": "graph", ".bin": "weights"})
    run = write_run(tmp_path / "run")
    with pytest.raises(L2R2Error, match=r"model\.bin, cannot be in the folder of a run"):
        export.export_run(run, run / "model.xml")
    hub.load_checkpoint(run)


def test_core_ml_names_its_inputs_and_outputs(tmp_path, coremltools, run, l2r2):
    file = tmp_path / "model.mlpackage"
    file.mkdir()
    (file / "old").write_text("of an earlier export")
    done = l2r2("export", run, "-o", file, "--fp16")
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 2, done.stderr
    assert "(9.8 MB)" in done.stdout or "(9.9 MB)" in done.stdout or "(10.0 MB)" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [file.name] and not (file / "old").exists()
    spec = coremltools.models.MLModel(str(file), skip_model_load=True).get_spec()
    shapes = {port.name: list(port.type.multiArrayType.shape) for port in spec.description.input}
    assert shapes == {"full_view": [1, 3, 32, 32], "fg_view": [1, 3, 32, 32], "has_fg": [1]}
    assert [port.name for port in spec.description.output] == ["fused", "full", "fg"]
    metadata = spec.description.metadata.userDefined
    assert json.loads(metadata["labels"]) == sorted(COLORS)
    assert ViewSpec.from_dict(json.loads(metadata["view_spec"])) == hub.load_checkpoint(run).model.view_spec


def test_core_ml_says_what_it_does_not_support(tmp_path, coremltools, run, l2r2):
    assert "Core ML has no inputs of varying size; export it with --input views" in sentence(
        l2r2("export", run, "-o", tmp_path / "model.mlpackage", "--input", "image")
    )
    late = write_run(tmp_path / "late")
    checkpoint = hub.load_checkpoint(late)
    checkpoint.model.view_spec = ViewSpec(size=32, fg_mode="late")
    hub.save_checkpoint(checkpoint.model, late, checkpoint.labels)
    said = sentence(l2r2("export", late, "-o", tmp_path / "model.mlpackage"))
    assert "model.mlpackage: not written, because Core ML does not support this network (Unsupported fx node where" in said
    assert [path.name for path in tmp_path.iterdir()] == ["late"]


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".mlpackage"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, run, suffix, monkeypatch, l2r2):
    package, extra = FORMATS[suffix].packages[0], FORMATS[suffix].extra
    monkeypatch.setattr(export_formats, "find_spec", lambda name: None if name == package else find_spec(name))
    said = sentence(l2r2("export", run, "-o", tmp_path / f"model{suffix}"))
    assert f"{FORMATS[suffix].name} needs {package}" in said and f'pip install "l2r2-models[{extra}]"' in said
    assert not list(tmp_path.iterdir())
