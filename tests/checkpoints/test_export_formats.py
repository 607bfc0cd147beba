"""Exports to OpenVINO, run by its own runtime, and to Core ML, whose files can be read but not run on Linux."""

import json

import pytest
import torch
from conftest import COLORS
from test_export import masked_run

from l2r2_models import L2R2Error, ViewSpec
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.checkpoints import export, export_formats


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def loaded(file):
    """The model of a file, and how it is run."""
    core = pytest.importorskip("openvino").Core()
    model = core.read_model(str(file))
    return model, core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize("takes", ["views", pytest.param("image", marks=pytest.mark.slow)])
def test_openvino_predicts_as_pytorch_whatever_the_batch(tmp_path, run, takes):
    pytest.importorskip("openvino")
    result = export.export_run(run, tmp_path / "model.xml", takes=takes)
    assert result.difference <= 1e-4 and names_in(tmp_path) == ["model.bin", "model.xml"]
    model, (file, network) = hub.load_checkpoint(run).model, loaded(result.file)
    assert tuple(port.get_any_name() for port in network.inputs) == result.inputs
    assert json.loads(file.get_rt_info(["framework", "labels"]).astype(str)) == sorted(COLORS)
    exact = export._kind_of(model, takes)(model)
    for count in (1, 4):  # sizes that the export has not tried
        inputs = export._trial(model, takes, count)
        with torch.inference_mode():
            wanted = dict(zip(result.outputs, exact(*inputs)))
        got = network([value.numpy() for value in inputs])
        for name, value in wanted.items():
            torch.testing.assert_close(torch.from_numpy(got[name]), value, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_openvino_in_half_precision_is_half_the_size(tmp_path, run):
    pytest.importorskip("openvino")
    result = export.export_run(run, tmp_path / "model.xml", fp16=True)
    assert 0 < result.difference < 0.05
    assert sum(path.stat().st_size for path in result.files) < 0.6 * (run / "model.safetensors").stat().st_size
    assert loaded(result.file)[0].inputs[0].element_type.to_string() == "f32"


def test_both_files_of_openvino_stay_if_the_new_ones_are_wrong(tmp_path, run, monkeypatch):
    pytest.importorskip("openvino")
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_text("old")
    monkeypatch.setitem(export.TOLERANCE, False, -1.0)
    with pytest.raises(L2R2Error, match="not written, because"):
        export.export_run(run, tmp_path / "model.xml")
    assert names_in(tmp_path) == ["model.bin", "model.xml"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


def test_core_ml_takes_the_views_of_one_image(tmp_path, run):
    coremltools = pytest.importorskip("coremltools")
    (tmp_path / "model.mlpackage").mkdir()
    (tmp_path / "model.mlpackage" / "old").write_text("from an earlier export")
    result = export.export_run(run, tmp_path / "model.mlpackage")
    assert names_in(tmp_path) == ["model.mlpackage"] and not (result.file / "old").exists()
    spec = coremltools.models.MLModel(str(result.file), skip_model_load=True).get_spec()
    shapes = {i.name: tuple(i.type.multiArrayType.shape) for i in spec.description.input}
    assert shapes == {"full_view": (1, 3, 32, 32), "fg_view": (1, 3, 32, 32), "has_fg": (1,)}
    assert tuple(output.name for output in spec.description.output) == result.outputs == ("fused", "full", "fg")
    about = spec.description.metadata.userDefined
    assert json.loads(about["labels"]) == sorted(COLORS)
    assert ViewSpec.from_dict(json.loads(about["view_spec"])) == hub.load_checkpoint(run).model.view_spec
    with pytest.raises(L2R2Error, match="Core ML takes only views of a fixed size; export it with --input views"):
        export.export_run(run, tmp_path / "other.mlpackage", takes="image")


@pytest.mark.slow
def test_core_ml_in_half_precision_is_half_the_size(tmp_path, run):
    pytest.importorskip("coremltools")
    result = export.export_run(run, tmp_path / "model.mlpackage", fp16=True)
    assert sum(path.stat().st_size for path in result.files) < 0.6 * (run / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("ending", "kind", "sentence"),
    [
        ("mlpackage", "tokens", "takes the object's mask, which Core ML does not support; export to ONNX"),
        ("mlpackage", "ifam", "finds the object inside the network, which Core ML does not support; export to ONNX"),
        ("xml", "ifam", "finds the object inside the network, which OpenVINO does not support; export to ONNX"),
    ],
)
def test_masks_inside_the_network_are_refused_where_they_cannot_be_written(tmp_path, ending, kind, sentence):
    pytest.importorskip("openvino")
    pytest.importorskip("coremltools")
    with pytest.raises(L2R2Error, match=sentence):
        export.export_run(masked_run(tmp_path / "run", kind), tmp_path / f"model.{ending}")
    assert names_in(tmp_path) == ["run"]


@pytest.mark.parametrize(("ending", "extra"), [("xml", "openvino"), ("mlpackage", "coreml"), ("onnx", "export")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, run, monkeypatch, ending, extra):
    monkeypatch.setattr(export_formats, "find_spec", lambda name: None)
    with pytest.raises(L2R2Error, match=rf'model\.{ending}: .* needs .*: pip install "l2r2-models\[{extra}\]"'):
        export.export_run(run, tmp_path / f"model.{ending}")
    assert not names_in(tmp_path)
