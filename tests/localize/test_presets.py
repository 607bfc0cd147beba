"""Localizers by use: what a preset stands for, what overrides it, what is recorded, and no localizer at all."""

import json

import pytest
from conftest import sentence

from l2r2_models import L2R2Error, Predictor, load_checkpoint
from l2r2_models.boxes.read import read_boxes
from l2r2_models.hub.card_usage import localizer_part
from l2r2_models.hub.metadata import CardMetadata
from l2r2_models.localize import LOCALIZERS, PRESETS, LocalizerSpec, create_localizer
from l2r2_models.localize.presets import expand, license_of


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_localizer_with_a_threshold_and_a_license(name):
    preset = PRESETS[name]
    spec = expand(LocalizerSpec.parse(name))
    assert spec.name in LOCALIZERS and str(spec) == preset.spec and float(preset.threshold) > 0
    assert license_of(spec) == preset.license == "apache-2.0"


def test_a_source_and_options_after_its_name_replace_its_own():
    spec = expand(LocalizerSpec.parse("camera-trap:models/owl?prompt=deer&threshold=0.3&masks=sam:models/sam"))
    assert (spec.name, spec.source) == ("owlv2", "models/owl")
    assert spec.options == {"threshold": ("0.3",), "prompt": ("deer",), "masks": ("sam:models/sam",)}
    assert license_of(spec) is None, "another folder may hold other weights"
    assert expand(LocalizerSpec.parse("center?share=0.2")) == LocalizerSpec.parse("center?share=0.2")


def test_a_preset_finds_what_its_localizer_finds(tiny, pictures):
    preset = create_localizer(f"camera-trap:{tiny('owlv2')}?prompt=red&threshold=0", device="cpu")
    plain = create_localizer(f"owlv2:{tiny('owlv2')}?prompt=red&threshold=0", device="cpu")
    assert str(preset.spec) == str(plain.spec) and preset.weights == plain.weights
    assert [d.boxes.tolist() for d in preset(pictures[:2])] == [d.boxes.tolist() for d in plain(pictures[:2])]


def test_the_command_shows_and_records_them(tiny, dataset, tmp_path, l2r2):
    shown = l2r2("localize", "--presets")
    assert shown.returncode == 0, shown.stderr
    for name, preset in PRESETS.items():
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith(name)]
        assert "google/owlv2-base-patch16-ensemble" in line and preset.threshold in line and line.endswith("apache-2.0")
    spec = f"prompt:{tiny('owlv2')}?threshold=0"
    done = l2r2(
        "localize", dataset, "--localizer", spec, "--prompt", "red", "-o", tmp_path / "b.json", "--device", "cpu", "--json"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["localizer"] == f"owlv2:{tiny('owlv2')}?prompt=red&threshold=0" and record["license"] is None
    assert read_boxes(tmp_path / "b.json").info["localizer"] == record["localizer"], "the file repeats without the preset"
    missing = l2r2("localize", dataset, "--localizer", spec, "-o", tmp_path / "c.json", "--device", "cpu")
    assert "owlv2 needs a prompt" in sentence(missing)
    assert "none finds no boxes" in sentence(l2r2("localize", dataset, "--localizer", "none", "-o", tmp_path / "d.json"))


def test_the_license_travels_with_the_boxes_to_the_model_card(dataset, tmp_path, l2r2):
    boxes, preset = tmp_path / "boxes.json", PRESETS["camera-trap"]
    assert l2r2("localize", dataset, "--localizer", "center", "-o", boxes).returncode == 0
    content = json.loads(boxes.read_text())  # as if made by the preset, whose weights are not here
    content["info"]["l2r2"].update(localizer=preset.spec, license=preset.license)
    boxes.write_text(json.dumps(content))
    options = ["--model", "timm:resnet10t", "--no-pretrained", "--size", 32, "--epochs", 1, "--boxes", boxes]
    done = l2r2("finetune", dataset, *options, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.localizer == {"spec": preset.spec, "license": "apache-2.0"}
    assert "license of the localizer: apache-2.0" in localizer_part(checkpoint, CardMetadata())


def test_a_known_source_has_its_license_in_the_record(tiny, monkeypatch):
    from l2r2_models.localize import presets

    folder = str(tiny("owlv2"))
    monkeypatch.setitem(presets.LICENSES, folder, "mit")
    assert create_localizer(f"owlv2:{folder}?prompt=red", device="cpu").info["license"] == "mit"
    masked = create_localizer(f"owlv2:{folder}?prompt=red&masks=sam:{tiny('sam')}", device="cpu")
    assert "license" not in masked.info, "the masks come from other weights"


def test_none_classifies_whole_images(run, dataset, tmp_path, l2r2):
    image = dataset / "images" / "test_000.png"
    plain, none = Predictor.from_pretrained(run, device="cpu"), Predictor.from_pretrained(run, device="cpu", localizer="none")
    assert none.localizer is None and none(image) == plain(image)
    done = l2r2("predict", run, dataset, "--localizer", "none", "-o", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    images = json.loads((tmp_path / "p.json").read_text())["images"]
    assert {o["source"] for found in images for o in found["objects"]} == {"full"}, "also where the metadata has boxes"
    with pytest.raises(L2R2Error, match="needs a localizer"):
        Predictor.from_pretrained(run, device="cpu", localizer="none", topk_prompts=2)
    with pytest.raises(L2R2Error, match='Unknown localizer "camera"; choose from camera-trap, prompt, owlv2'):
        create_localizer("camera", device="cpu")
