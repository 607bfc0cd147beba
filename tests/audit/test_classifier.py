"""Loading any classifier for the audit, and matching its class names."""

import pytest
import timm
import torch
from audit_cases import write_model
from conftest import write_run
from timm.models import save_for_hf

from l2r2_models import L2R2Error
from l2r2_models.audit.classifier import load_audited, match_classes


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A checkpoint of a timm model with ImageNet's classes, as timm saves it."""
    folder = tmp_path_factory.mktemp("imagenet")
    save_for_hf(timm.create_model("test_resnet"), str(folder), safe_serialization=True)
    return load_audited(folder)


def test_imagenet_classes_go_by_wordnet_id_and_by_synonym(imagenet):
    assert len(imagenet.names) == 1000
    labels = ["n01440764", "goldfish", "Great_White_Shark"]
    assert match_classes(labels, imagenet) == {"n01440764": [0], "goldfish": [1], "Great_White_Shark": [2]}


def test_an_ambiguous_name_needs_a_map_and_one_class_may_mean_several(imagenet, tmp_path):
    with pytest.raises(L2R2Error, match="several classes of the model are called crane; pass --classes"):
        match_classes(["crane"], imagenet)
    (tmp_path / "map.csv").write_text("class,model_class\ncrane,n02012849\nfish,tench\nfish,goldfish\n")
    assert match_classes(["crane", "fish"], imagenet, tmp_path / "map.csv") == {"crane": [134], "fish": [0, 1]}


def test_what_does_not_match_is_listed(imagenet):
    with pytest.raises(L2R2Error) as error:
        match_classes(["cow", *(f"kind {i}" for i in range(20))], imagenet)
    assert "21 class names match no class of the model: cow, kind 0" in str(error.value) and "(21)" in str(error.value)


def test_a_plain_model_predicts_as_timm_does_and_is_cut_by_its_pretrained_cfg(imagenet, tmp_path):
    assert imagenet.answers == ("full",) and imagenet.spec.size == imagenet.network.pretrained_cfg["input_size"][-1]
    assert imagenet.spec.mean == tuple(imagenet.network.pretrained_cfg["mean"]) and not imagenet.network.training


def test_the_digest_tells_weights_and_fusions_apart(tmp_path):
    first, same = (load_audited(write_run(tmp_path / name)).digest() for name in "ab")
    assert first == same
    others = [
        load_audited(write_run(tmp_path / "c", seed=1)).digest(),
        load_audited(write_run(tmp_path / "d", fusion={"name": "robust", "threshold": 0.9})).digest(),
        load_audited(write_run(tmp_path / "e", fusion="average")).digest(),
    ]
    assert len({first, *others}) == 4


def test_models_without_class_names_or_of_other_channels_are_refused(tmp_path):
    for name, options, says in (
        ("names", {"num_classes": 7}, "the names of its 7 classes are unknown; pass --labels FILE"),
        ("channels", {"in_chans": 1}, "is not a classifier of RGB images"),
        ("headless", {"num_classes": 0}, "is not a classifier of RGB images"),
    ):
        (tmp_path / name).mkdir()
        model = timm.create_model("test_resnet", **options)
        model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": model.num_classes}
        save_for_hf(model, str(tmp_path / name), safe_serialization=True)
        with pytest.raises(L2R2Error, match=says):
            load_audited(tmp_path / name)
    with pytest.raises(L2R2Error, match="do not pass --labels"):
        load_audited(write_run(tmp_path / "run"), tmp_path / "names.txt")


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    folder = write_model(tmp_path / "model", "middle")
    (folder / "model.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(L2R2Error, match="its pretrained weights cannot be loaded"):
        load_audited(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(L2R2Error, match=r"has no model\.safetensors"):
        load_audited(folder)


def test_weights_of_half_precision_have_a_digest_too(tmp_path):
    model = load_audited(write_model(tmp_path / "model", "middle"))
    model.network.to(torch.bfloat16)
    assert len(model.digest()) == 64
