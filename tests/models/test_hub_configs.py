"""Hub configs: the table in the package, the strict schema of the YAML files, reading and writing."""

import csv
import hashlib
import tempfile
from collections import Counter
from dataclasses import asdict

import pytest
import yaml
from l2r2_hub_configs import TABLE, derived_configs
from timm.models import get_pretrained_cfg

from l2r2_models.errors import L2R2Error
from l2r2_models.io import file_sha256, read_json, write_atomic, write_json, write_text
from l2r2_models.models.hub_configs import load_hub_configs, parse_hub_config

GOOD = {
    "architecture": "l2r2_convnext_base",
    "tag": "in1k",
    "default": True,
    "source": "convnext_base.in1k",
    "hub_id": "timm/convnext_base.in1k",
    "license": "apache-2.0",
    "labels": "1000 classes",
    "parameters": 5,
    "input_size": 224,
    "top1": 85.5,
    "made_by": "derived",
}
TEXTS = ("architecture", "tag", "source", "hub_id", "license", "labels", "made_by")
OPTIONAL = ("license", "labels", "top1")


def refused(data):
    with pytest.raises(L2R2Error) as caught:
        parse_hub_config(data, "some.yaml")
    assert str(caught.value).startswith("some.yaml: ")
    return str(caught.value)


def test_a_good_config():
    config = parse_hub_config(GOOD, "some.yaml")
    assert {k: v for k, v in asdict(config).items() if v is not None} == GOOD and not config.trained
    assert config.name == "l2r2_convnext_base.in1k"


def test_a_whole_number_is_a_fine_accuracy():
    assert parse_hub_config({**GOOD, "top1": 85}, "some.yaml").top1 == 85


@pytest.mark.parametrize("key", ["color", 5, None, True, ("a", "b")])
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


TRAINED = {
    **GOOD,
    "tag": "fungi",
    "default": False,
    "label_names": ["oak", "elm"],
    "model_args": {"branches": ["full", "fg"]},
    "localizer": {"spec": "owlv2", "prompt": "tree", "license": "apache-2.0"},
    "metrics": [{"dataset": "trees", "split": "test", "output": "fused", "metric": "accuracy", "value": 0.9}],
}


def test_a_trained_checkpoint():
    config = parse_hub_config(TRAINED, "some.yaml")
    assert parse_hub_config(yaml.safe_load(config.to_yaml()), "again.yaml") == config
    assert list(yaml.safe_load(parse_hub_config(GOOD, "some.yaml").to_yaml())) == list(GOOD)
    assert asdict(parse_hub_config(TRAINED, "some.yaml")) == TRAINED and parse_hub_config(TRAINED, "some.yaml").trained


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_names": None}, "must be given together"),
        ({"label_names": ["a", "a"]}, "must be distinct"),
        ({"label_names": []}, "must be distinct"),
        ({"default": True}, "default"),
        ({"localizer": {"name": "x"}}, "localizer"),
        ({"localizer": {"spec": 3}}, "localizer"),
        ({"metrics": [{"dataset": "trees"}]}, "metrics"),
        ({"metrics": [{**TRAINED["metrics"][0], "value": "high"}]}, "metrics"),
        ({"metrics": {}}, "metrics"),
    ],
)
def test_a_trained_checkpoint_that_is_not_right(change, said):
    assert said in refused({**TRAINED, **change})


# ---- the files ----


def test_the_table_has_one_row_per_tag_in_order():
    """A diff of the table shows what changed: rows stay sorted, and nothing is written that follows from the rest."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    places = [(row["architecture"], row["source"]) for row in rows]
    assert places == sorted(set(places)) and len(places) == len(derived_configs()) > 100
    assert {row["default"] for row in rows} == {"", "yes"} and not {"tag", "hub_id", "made_by"} & set(rows[0])


def test_each_row_says_how_its_weights_come_about():
    by = {c.name: c.made_by for c in derived_configs()}
    assert "both heads start from the source's weights" in by["l2r2_resnet18.a1_in1k"]
    assert "no classifier; heads are random" in by["l2r2_convnext_base.dinov3_lvd1689m"]
    assert "stage 1's head are random" in by["ifam_vit_tiny_patch16_224.augreg_in21k_ft_in1k"]


def test_names_are_unique_and_sorted():
    names = [c.name for c in load_hub_configs()]
    assert len(names) > 50 and names == sorted(set(names))


def test_every_architecture_has_one_default():
    defaults = Counter(c.architecture for c in load_hub_configs() if c.default)
    assert defaults == {c.architecture: 1 for c in load_hub_configs()}


def test_values_make_sense():
    for c in load_hub_configs():
        assert c.architecture.startswith(("l2r2_", "ifam_")) and c.parameters > 0 and 32 <= c.input_size <= 1024, c.name
        assert c.top1 is None or 20 < c.top1 < 100, c.name
        assert "/" in c.hub_id and c.tag in c.source and c.made_by, c.name


def test_source_license_and_size_are_timms():
    for c in load_hub_configs():
        cfg = get_pretrained_cfg(c.source, allow_unregistered=False)
        assert c.license == (cfg.license or None), c.name
        assert c.input_size == cfg.input_size[-1] and c.hub_id == (cfg.hf_hub_id or c.hub_id), c.name
        assert c.labels is None or cfg.num_classes, c.name


# ---- files: written whole or not at all ----


@pytest.fixture
def old(tmp_path):
    (tmp_path / "out.json").write_text("old")
    return tmp_path / "out.json"


def only_old(path):
    return path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_write_atomic_replaces_and_leaves_nothing_else(old):
    write_atomic(old, lambda temporary: temporary.write_text("new") and None)
    assert old.read_text() == "new" and list(old.parent.iterdir()) == [old]
    assert old.stat().st_mode & 0o444 == 0o444  # results are meant to be read by others


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, MemoryError, SystemExit])
def test_a_writer_that_raises_leaves_the_old_content(old, error):
    def write(temporary):
        temporary.write_text("half")
        raise error("stop")

    with pytest.raises(L2R2Error if error is OSError else error, match="stop"):
        write_atomic(old, write)
    assert only_old(old)


def test_data_that_is_no_json_leaves_the_old_content(old):
    for data in ([float("nan")], {"a": float("inf")}):
        with pytest.raises(L2R2Error, match=r"out\.json"):
            write_json(old, data)
    with pytest.raises(TypeError):
        write_json(old, [object()])
    assert only_old(old)


def test_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", {"ä": [1, None, "\ud800"]})
    assert read_json(tmp_path / "a" / "b" / "c.json") == {"ä": [1, None, "\ud800"]}


def test_the_longest_name_that_a_file_can_have(tmp_path):
    write_text(tmp_path / ("x" * 255), "text")
    assert (tmp_path / ("x" * 255)).read_text() == "text"


def test_places_that_cannot_be_written(old):
    (old.parent / "folder").mkdir()
    for path in (old / "below.json", old.parent / "folder", old.parent / ("x" * 256), "/proc/none/out.json"):
        with pytest.raises(L2R2Error, match="cannot be written"):
            write_text(path, "text")
    assert sorted(p.name for p in old.parent.iterdir()) == ["folder", "out.json"] and not list((old.parent / "folder").iterdir())


def test_a_folder_without_the_right_to_write(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)  # these tests may run as root, who may write anywhere
    with pytest.raises(L2R2Error, match=r"out\.json: cannot be written \(Permission denied\)\."):
        write_text(tmp_path / "out.json", "text")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b"\x00"], ids=range(6))
def test_what_is_no_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(L2R2Error, match=r"a\.json: is not readable JSON") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(L2R2Error, match=r"a\.json: no such file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(L2R2Error, match=r"a\.json: cannot be read"):
        file_sha256(tmp_path / "a.json")


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1_000_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
