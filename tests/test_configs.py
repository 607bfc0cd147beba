"""Hub configs: the strict schema, and the files that come with the package."""

from collections import Counter
from dataclasses import asdict, fields
from importlib import resources

import pytest
import yaml
from timm.models import get_pretrained_cfg

from l2r2_models.configs import HubConfig, load_hub_configs, parse_hub_config
from l2r2_models.errors import L2R2Error

GOOD = {
    "architecture": "l2r2_convnext_base", "tag": "in1k", "default": True, "source": "convnext_base.in1k",
    "hub_id": "timm/convnext_base.in1k", "licence": "apache-2.0", "labels": "1000 classes", "parameters": 5, "input_size": 224,
    "top1": 85.5, "made_by": "derived",
}  # fmt: skip
TEXTS = ("architecture", "tag", "source", "hub_id", "licence", "labels", "made_by")
OPTIONAL = ("licence", "labels", "top1")


def refused(data):
    with pytest.raises(L2R2Error) as caught:
        parse_hub_config(data, "some.yaml")
    assert str(caught.value).startswith("some.yaml: ")
    return str(caught.value)


def test_a_good_config():
    config = parse_hub_config(GOOD, "some.yaml")
    assert asdict(config) == GOOD and config.name == "l2r2_convnext_base.in1k"


def test_a_whole_number_is_a_fine_accuracy():
    assert parse_hub_config({**GOOD, "top1": 85}, "some.yaml").top1 == 85


@pytest.mark.parametrize("key", ["colour", 5, None, True, ("a", "b")])
def test_unknown_keys(key):
    assert "unknown key" in refused({**GOOD, key: 1})
    assert "unknown key" in refused({**GOOD, key: 1, "another": 2})


@pytest.mark.parametrize("key", GOOD)
def test_missing_keys(key):
    assert key in refused({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize("data", [None, [], "text", 5, [GOOD]])
def test_not_a_mapping(data):
    refused(data)


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize("value", [5, 1.5, True, ["a"], {}])
def test_text_must_be_text(key, value):
    assert key in refused({**GOOD, key: value})


@pytest.mark.parametrize("key", ["parameters", "input_size"])
@pytest.mark.parametrize("value", [True, False, 1.0, "224", None, [224]])
def test_counts_must_be_integers(key, value):
    assert key in refused({**GOOD, key: value})


@pytest.mark.parametrize("value", [True, False, "85.5", [85.5]])
def test_accuracy_must_be_a_number(value):
    assert "top1" in refused({**GOOD, "top1": value})


@pytest.mark.parametrize("value", [0, 1, "true", None, "yes"])
def test_default_must_be_a_boolean(value):
    assert "default" in refused({**GOOD, "default": value})


@pytest.mark.parametrize("key", OPTIONAL)
def test_optional_keys_may_be_null(key):
    assert getattr(parse_hub_config({**GOOD, key: None}, "some.yaml"), key) is None


@pytest.mark.parametrize("key", [k for k in GOOD if k not in OPTIONAL])
def test_the_others_may_not(key):
    assert key in refused({**GOOD, key: None})


# ---- the files ----


def test_the_files_are_named_after_their_checkpoint():
    folder = resources.files("l2r2_models.hub_configs")
    files = {e.name for e in folder.iterdir() if e.name.endswith(".yaml")}
    assert files == {f"{c.name}.yaml" for c in load_hub_configs()}


def test_names_are_unique_and_sorted():
    names = [c.name for c in load_hub_configs()]
    assert len(names) > 50 and names == sorted(set(names))


def test_every_architecture_has_one_default():
    defaults = Counter(c.architecture for c in load_hub_configs() if c.default)
    assert defaults == {c.architecture: 1 for c in load_hub_configs()}


def test_values_make_sense():
    for c in load_hub_configs():
        assert c.architecture.startswith("l2r2_") and c.parameters > 0 and 32 <= c.input_size <= 1024, c.name
        assert c.top1 is None or 20 < c.top1 < 100, c.name
        assert "/" in c.hub_id and c.tag in c.source and c.made_by, c.name


def test_source_licence_and_size_are_timms():
    for c in load_hub_configs():
        cfg = get_pretrained_cfg(c.source, allow_unregistered=False)
        assert c.licence == (cfg.license or None), c.name
        assert c.input_size == cfg.input_size[-1] and c.hub_id == (cfg.hf_hub_id or c.hub_id), c.name
        assert (c.labels is None) == (not cfg.num_classes), c.name


def test_the_schema_is_what_the_files_hold():
    text = (resources.files("l2r2_models.hub_configs") / f"{load_hub_configs()[0].name}.yaml").read_text(encoding="utf-8")
    assert list(yaml.safe_load(text)) == [f.name for f in fields(HubConfig)]
