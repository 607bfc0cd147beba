"""ViewSpec: round trip through a checkpoint, and strict validation."""

import json

import pytest

from l2r2_models.errors import L2R2Error
from l2r2_models.views import ViewSpec

NAN = float("nan")

SPECS = [
    ViewSpec(),
    ViewSpec(size=384, fg_mode="masked_crop", bg="box", margin=0.1, fill=(0, 1, 255), interpolation="bilinear", mode="pil"),
    ViewSpec(square=False, mean=(0.5, 0.5, 0.5), std=(1, 2, 3), margin=10, decode="scaled"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_survives_json(spec):
    again = ViewSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and hash(again) == hash(spec) and again.to_dict() == spec.to_dict()


def test_lists_make_the_same_spec():
    assert ViewSpec(fill=[1, 2, 3], mean=[0.5] * 3) == ViewSpec(fill=(1, 2, 3), mean=(0.5,) * 3)


def test_old_configs_get_the_defaults():
    assert ViewSpec.from_dict({}) == ViewSpec() and ViewSpec.from_dict({"size": 96}) == ViewSpec(size=96)
    assert ViewSpec.from_dict({}).decode == "full"  # as they were trained, before there was another way


@pytest.mark.parametrize("key", ["sizes", "Size", "", 5, None])
def test_unknown_fields(key):
    with pytest.raises(L2R2Error, match="Unknown view field"):
        ViewSpec.from_dict({"size": 224, key: 1})


@pytest.mark.parametrize(
    "name, values",
    {
        "size": [0, -1, 224.0, "224", None, True, [224, 224], NAN],
        "fg_mode": ["later", "", None, 1, ["crop"], {}],
        "bg": ["crop", None, ["box"]],
        "interpolation": ["nearest", "Bicubic", None],
        "mode": ["pillow", None],
        "decode": ["half", "", None, 2],
        "margin": [-0.1, 10.1, NAN, float("inf"), "0.1", None, True, [0.1]],
        "square": ["false", "true", 0, 1, None],
        "fill": [
            None,
            124,
            (1, 2),
            (1, 2, 3, 4),
            (-1, 0, 0),
            (0, 0, 256),
            (0.5, 0, 0),
            "red",
            ("1",) * 3,
            (NAN, 0, 0),
            (True, 0, 0),
        ],
        "mean": [None, 0.5, (0.5, 0.5), ("a", "b", "c"), (NAN, 0, 0), (None,) * 3, (float("inf"), 0, 0)],
        "std": [None, (0, 1, 1), (-1, 1, 1), (0.2, 0.2), (NAN, 1, 1), "abc"],
    }.items(),
)
def test_values_that_are_no_views(name, values):
    for value in values:
        with pytest.raises(L2R2Error, match=name):
            ViewSpec.from_dict({name: value})


def test_pil_mode_needs_squares():
    with pytest.raises(L2R2Error, match="square"):
        ViewSpec(mode="pil", square=False)


def test_pil_mode_decodes_in_full():
    with pytest.raises(L2R2Error, match='decode "full"'):
        ViewSpec(mode="pil", decode="scaled")
    assert ViewSpec.from_pretrained_cfg({}, mode="pil").decode == "full"


def test_spec_of_a_timm_model():
    cfg = {"input_size": (3, 384, 384), "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": [0.5, 0.5, 0.5]}
    spec = ViewSpec.from_pretrained_cfg(cfg, margin=0.1)
    own = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "fill": (128, 128, 128), "decode": "scaled"}
    assert spec == ViewSpec(384, margin=0.1, interpolation="bilinear", **own)
    assert ViewSpec.from_pretrained_cfg({}) == ViewSpec(decode="scaled")
    assert ViewSpec.from_pretrained_cfg({"interpolation": "random"}, size=96).interpolation == "bicubic"
