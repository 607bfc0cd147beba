"""Exported models: views cut in the graph vs. `make_views`, files vs. PyTorch, and the example without PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import COLORS, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from l2r2_models import L2R2Error, Predictor, ViewSpec
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.checkpoints import export
from l2r2_models.views import make_views
from l2r2_models.views.traceable import cut_in_graph

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_onnx.py"
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@given(
    fg=st.sampled_from(["crop", "masked_crop", "masked"]),
    bg=st.sampled_from(["shape", "box"]),
    square=st.booleans(),
    margin=st.sampled_from([0.0, 0.3]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.sampled_from([1, 7, 32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_cutting_in_plain_operations_is_make_views(fg, bg, square, margin, interpolation, height, width, size, seed):
    spec = ViewSpec(size=size, fg_mode=fg, bg=bg, square=square, margin=margin, interpolation=interpolation)
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    corner = torch.rand(6, 2, generator=generator) * 100 - 20
    boxes = torch.cat([corner, corner + torch.rand(6, 2, generator=generator) * 80], 1)
    boxes[-1], boxes[-2, 0] = torch.nan, torch.inf
    branches = ("full", "fg", "bg")
    wanted = make_views([image], boxes, spec, branches=branches, image_index=torch.zeros(6, dtype=torch.int64))
    views, has_fg = cut_in_graph(image, boxes, spec, branches)
    assert torch.equal(has_fg, wanted.has_fg)
    for branch in branches:
        got = views[branch].expand(6, -1, -1, -1)
        torch.testing.assert_close(got, getattr(wanted, branch), atol=2e-4, rtol=0)


def session_of(file):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session, session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("options", [{"branches": ("full",)}, {"shared": False, "fusion": "average"}])
def test_onnx_of_views_at_any_batch_size(tmp_path, options):
    run = write_run(tmp_path / "run", **options)
    result = export.export_run(run, tmp_path / "model.onnx")
    assert result.difference <= 1e-4 and sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "run"]
    session, metadata = session_of(result.file)
    model = hub.load_checkpoint(run).model
    assert json.loads(metadata["labels"]) == sorted(COLORS)
    assert ViewSpec.from_dict(json.loads(metadata["view_spec"])) == model.view_spec
    for batch in (1, 5):
        views = {b: torch.randn(batch, 3, 32, 32) for b in model.branches}
        has_fg = torch.arange(batch) % 2 == 0
        with torch.inference_mode():
            wanted = model.forward_views(has_fg=has_fg, **views)
        given = {f"{b}_view": v.numpy() for b, v in views.items()}
        given |= {"has_fg": has_fg.numpy()} if len(views) > 1 else {}
        answers = dict(zip(result.outputs, session.run(None, given)))
        for name, answer in answers.items():
            torch.testing.assert_close(torch.from_numpy(answer), getattr(wanted, name), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def of_image(run, tmp_path_factory):
    return export.export_run(run, tmp_path_factory.mktemp("export") / "model.onnx", takes="image").file


def test_onnx_of_an_image_and_its_boxes_predicts_as_predict(run, of_image):
    session, _ = session_of(of_image)
    predictor = Predictor.from_pretrained(run, device="cpu")
    for size, boxes in (((64, 48), [[4, 4, 40, 40]]), ((33, 91), [[0, 0, 33, 91], [5.5, 20, 30, 80], [-9, 50, 70, 99]])):
        photo = Image.effect_noise(size, 90).convert("RGB")
        wanted = [{a.label: a.score for a in o.top} for o in predictor(photo, boxes).objects]
        fused = session.run(["fused"], {"image": np.asarray(photo), "boxes": np.asarray(boxes, np.float32)})[0]
        scores = torch.from_numpy(fused).softmax(-1)
        labels = predictor.labels
        got = [{label: round(float(p), 6) for label, p in zip(labels, row)} for row in scores]
        for row in wanted:
            assert any(all(abs(row[k] - g[k]) < 2e-5 for k in row) for g in got)
    none = np.full((1, 4), np.nan, np.float32)
    fused, full, _, has_fg = session.run(None, {"image": np.asarray(photo), "boxes": none})
    assert not has_fg[0] and np.array_equal(fused, full)


@pytest.mark.parametrize("takes", ["views", "image"])
def test_torch_export_comes_back_with_its_metadata(tmp_path, run, takes):
    result = export.export_run(run, tmp_path / "model.pt2", takes=takes)
    assert result.difference <= 1e-4
    extra = {"l2r2.json": ""}
    program = torch.export.load(str(result.file), extra_files=extra)
    assert json.loads(json.loads(extra["l2r2.json"])["labels"]) == sorted(COLORS)
    inputs = export._trial(hub.load_checkpoint(run).model, takes, 4)
    assert program.module()(*inputs)[0].shape == (4, 3)


def test_half_precision_is_half_the_size_and_close(tmp_path, run):
    result = export.export_run(run, tmp_path / "model.onnx", fp16=True)
    assert 0 < result.difference < 0.05
    assert result.file.stat().st_size < 0.55 * (run / "model.safetensors").stat().st_size
    assert session_of(result.file)[0].get_inputs()[0].type == "tensor(float)"


def test_a_vit_of_fixed_size(tmp_path):
    import timm

    model = timm.create_model("l2r2_vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg, size=32)
    hub.save_checkpoint(model, tmp_path / "run", sorted(COLORS))
    assert export.export_run(tmp_path / "run", tmp_path / "model.onnx").difference <= 1e-4


def test_a_file_with_other_outputs_is_not_written(tmp_path, run, monkeypatch):
    monkeypatch.setitem(export.TOLERANCE, False, -1.0)
    (tmp_path / "model.pt2").write_text("old")
    with pytest.raises(L2R2Error, match=r"not written, because .* differs from PyTorch by"):
        export.export_run(run, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_network_for_the_whole_image_can_be_exported_whatever_its_fg_would_be(tmp_path):
    """One of a pair that was taken apart keeps the views of the pair."""
    run = write_run(tmp_path / "run", branches=("full",))
    checkpoint = hub.load_checkpoint(run)
    checkpoint.model.view_spec = ViewSpec(size=32, fg_mode="late")
    hub.save_checkpoint(checkpoint.model, run, checkpoint.labels)
    assert export.export_run(run, tmp_path / "model.pt2").difference <= 1e-4


def test_what_cannot_be_exported_is_refused(tmp_path, run):
    with pytest.raises(L2R2Error, match=r"x\.tflite: name the file \*\.onnx \(ONNX\), \*\.xml \(OpenVINO\), "):
        export.export_run(run, tmp_path / "x.tflite")
    with pytest.raises(L2R2Error, match='Unknown input "pixels"'):
        export.export_run(run, tmp_path / "x.onnx", takes="pixels")
    checkpoint = hub.load_checkpoint(run)
    checkpoint.model.view_spec = ViewSpec(size=32, mode="pil")
    hub.save_checkpoint(checkpoint.model, tmp_path / "pil", checkpoint.labels)
    with pytest.raises(L2R2Error, match='view mode "pil" cannot be exported'):
        export.export_run(tmp_path / "pil", tmp_path / "x.onnx", takes="image")
    assert [path.name for path in tmp_path.iterdir()] == ["pil"]


def test_the_command(tmp_path, run, monkeypatch, capsys):
    from l2r2_cli.commands import main

    monkeypatch.setattr(sys, "argv", ["l2r2", "export", str(run), "-o", str(tmp_path / "model.pt2")])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "its logits differ from PyTorch's by at most" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["l2r2", "export", str(run), "-o", str(tmp_path / "model.bin")])
    with pytest.raises(SystemExit):
        main()
    assert "model.bin: name the file *.onnx (ONNX)" in capsys.readouterr().err


def example(*arguments):
    """The example in a process that has no torch."""
    code = "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0])"
    return subprocess.run([sys.executable, "-c", code, str(EXAMPLE), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["16 bit", "alpha", "one color transparent"])
def test_the_example_refuses_files_that_predict_reads_with_more_care(tmp_path, of_image, kind):
    photo = Image.effect_noise((64, 48), 90)
    if kind == "16 bit":
        photo = Image.fromarray(np.asarray(photo).astype(np.uint16) * 257)
    photo = photo.convert("RGBA") if kind == "alpha" else photo
    photo.save(tmp_path / "photo.png", **({"transparency": 90} if kind == "one color transparent" else {}))
    result = example(of_image, tmp_path / "photo.png")
    assert result.returncode == 1 and "use `l2r2 predict`" in result.stderr and "Traceback" not in result.stderr


def test_the_example_without_torch(tmp_path, run, of_image):
    photo = Image.effect_noise((64, 48), 90).convert("RGB")
    photo.save(tmp_path / "photo.png")
    box = ["4", "4", "40", "40"]
    lines = example(of_image, tmp_path / "photo.png", *box).stdout.splitlines()
    answer = Predictor.from_pretrained(run, device="cpu")(photo, [[float(v) for v in box]]).objects[0]
    name, label, score = lines[0].split()
    assert (name, label) == ("fused", answer.label) and abs(float(score) - answer.score) < 1e-3
    assert [line.split()[0] for line in lines] == ["fused", "full", "fg"]


MASKED = {
    "tokens": ("l2r2_masked_vit_small_patch16_224", {"branches": ("full", "fg")}),
    "tokens alone": ("l2r2_masked_vit_small_patch16_224", {"branches": ("fg",)}),
    "ifam": ("ifam_vit_tiny_patch16_224", {"num_parts": 3}),
}


def masked_run(folder, kind):
    torch.manual_seed(0)
    name, options = MASKED[kind]
    model = timm.create_model(name, num_classes=3, img_size=32, depth=2, embed_dim=48, num_heads=3, patch_size=8, **options)
    hub.save_checkpoint(model, folder, sorted(COLORS))
    return folder


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("kind", ["tokens", pytest.param("tokens alone", marks=pytest.mark.slow), "ifam"])
def test_models_that_drop_tokens_predict_the_same_at_any_batch_size_and_mask(tmp_path, kind, suffix):
    run = masked_run(tmp_path / "run", kind)
    result = export.export_run(run, tmp_path / f"model{suffix}")
    assert result.difference <= 1e-4 and result.inputs == (("full_view",) if kind == "ifam" else ("full_view", "mask"))
    model = hub.load_checkpoint(run).model
    view, mask = torch.randn(5, 3, 32, 32), (torch.rand(5, 32, 32) > 0.7).float()
    mask[0] = 0
    given = (view,) if kind == "ifam" else (view, mask)
    if suffix == ".onnx":
        session, _ = session_of(result.file)
        got = session.run(None, {name: value.numpy() for name, value in zip(result.inputs, given)})
    else:
        with torch.no_grad():
            got = torch.export.load(result.file).module()(*given)
    with torch.inference_mode():
        whole = "full" if "full" in model.branches else "fg"
        wanted = model.forward_views(**{whole: view}, **({} if kind == "ifam" else {"mask": mask}))
    assert np.array_equal(np.asarray(got[-1]), wanted.has_fg.numpy()) and (kind == "ifam" or not got[-1][0])
    assert np.allclose(np.asarray(got[0]), wanted.fused.numpy(), atol=1e-4)


def test_what_would_keep_one_mask_is_refused(tmp_path):
    run = masked_run(tmp_path / "run", "ifam")
    with pytest.raises(L2R2Error, match=r"cannot be traced by torch\.jit; use torch.export"):
        torch.jit.trace(hub.load_checkpoint(run).model, torch.randn(1, 3, 32, 32))
    with pytest.raises(L2R2Error, match="finds the object itself inside the network; export it with --input views"):
        export.export_run(run, tmp_path / "model.onnx", takes="image")
