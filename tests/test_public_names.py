"""The public names: all exist, the slow ones are lazy, all are shown by completion."""

import subprocess
import sys

import pytest

import l2r2_models
from l2r2_models.predict.prediction import ObjectPrediction, Prediction

PROMISED = (
    "L2R2",
    "Predictor",
    "Prediction",
    "ViewSpec",
    "make_views",
    "list_models",
    "load_checkpoint",
    "finetune",
    "evaluate_run",
    "create_fusion",
)


def test_promised_names_are_public_and_documented():
    for name in PROMISED:
        assert name in l2r2_models.__all__ and name in dir(l2r2_models)
        assert getattr(l2r2_models, name).__doc__
    assert all(getattr(l2r2_models, name) is not None for name in l2r2_models.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Predictr'"):
        l2r2_models.Predictr  # noqa: B018


def test_the_package_alone_loads_neither_training_nor_prediction():
    code = "import sys, l2r2_models; print(*[m for m in sys.modules if m.startswith(('l2r2_models.train', 'l2r2_models.pred'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_list_models_lists_ours_only():
    names = l2r2_models.list_models()
    assert "l2r2_convnextv2_base" in names and "l2r2" in names and "ifam_vit_tiny_patch16_224" in names
    assert not any(name.startswith("resnet") for name in names)
    assert "l2r2_resnet18.fb_swsl_ig1b_ft_in1k" in l2r2_models.list_models("l2r2_resnet18*", pretrained=True)


def test_a_prediction_has_the_first_objects_label_score_and_reason():
    first = ObjectPrediction("oak", 0.9, "fused", "the object decides", None, None, None, None, None, ())
    second = ObjectPrediction("elm", 0.8, "fused", "another", None, None, None, None, None, ())
    prediction = Prediction("a.jpg", (first, second))
    assert (prediction.label, prediction.score, prediction.reason) == ("oak", 0.9, "the object decides")
    for name in ("label", "score", "reason"):
        with pytest.raises(l2r2_models.L2R2Error, match="cannot be read"):
            getattr(Prediction("b.jpg", (), "b.jpg: cannot be read."), name)
