"""Loading from a Hub: every interface gives the same model, and no failure leaves it half-loaded."""

import json

import pytest
import timm
import torch
from conftest import COLORS, write_run
from hub_double import TOKEN, HubDouble
from PIL import Image
from pulling import pull

from l2r2_models import L2R2Error, Predictor
from l2r2_models.checkpoints import checkpoint as hub


def files_of(run):
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture
def hub_of(runs, tmp_path, monkeypatch):
    """A Hub with org/name: `v1` is the first run, `main` the second; and the same privately."""
    with HubDouble().running() as double:
        double.connect(monkeypatch, tmp_path / "home")
        for name, options in (("org/name", {}), ("org/private", {"private": True}), ("org/gated", {"gated": True})):
            first = double.add(name, files_of(runs[0]), **options)
            double.repos[name].refs["v1"] = first
            double.add(name, files_of(runs[1]), "second")
        yield double


def same_weights(model, run):
    other = hub.load_checkpoint(run).model.state_dict()
    return all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


def test_every_way_in_gives_the_same_logits_also_offline(hub_of, runs, tmp_path):
    """timm, ours and transformers, each in a fresh process; then all of them offline from the filled cache."""
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    boxes = torch.tensor([[2.0, 2, 20, 30], [float("nan")] * 4])
    model = hub.load_checkpoint(runs[1]).model
    with torch.no_grad():
        expected = [model(x).tolist(), model(x, boxes).tolist()]
    home = tmp_path / "home"
    ways = ["timm=hf-hub:org/name", "predictor=org/name", "transformers=org/name"]
    online = [pull(hub_of, home, way) for way in ways]
    answers = [process.communicate(timeout=240) for process in online]
    requests = len(hub_of.log)
    answers.append(pull(hub_of, home, *ways, HF_HUB_OFFLINE="1").communicate(timeout=240))
    got = [json.loads(line) for out, _ in answers for line in out.splitlines()]
    assert got == [expected] * 6, "".join(err[-2000:] for _, err in answers)
    assert requests == len(hub_of.log) and hub_of.count("GET /cdn/")


def test_a_registered_tag_downloads_from_its_hub_id(hub_of):
    source = timm.create_model("resnet18", num_classes=1000)
    from safetensors.torch import save

    hub_of.add("timm/resnet18.a1_in1k", {"model.safetensors": save(source.state_dict()), "config.json": b"{}"})
    model = timm.create_model("l2r2_resnet18.a1_in1k", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), source.eval()(x))
    assert torch.equal(model.heads["fg"].weight, source.fc.weight)
    gray = timm.create_model("l2r2_resnet18.a1_in1k", pretrained=True, in_chans=1, num_classes=5)
    assert gray(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    assert hub_of.count("GET /cdn/") == 1  # the second time out of the cache


def test_revisions_by_tag_branch_and_commit(hub_of, runs):
    assert same_weights(hub.load_checkpoint("org/name").model, runs[1])
    assert same_weights(hub.load_checkpoint("hf-hub:org/name@v1").model, runs[0])
    commit = hub_of.repos["org/name"].refs["v1"]
    assert same_weights(timm.create_model(f"hf-hub:org/name@{commit}", pretrained=True), runs[0])
    with pytest.raises(L2R2Error, match="org/name on the Hub has no revision v9"):
        hub.load_checkpoint("org/name@v9")


def test_other_classes_and_channels(hub_of, runs):
    model = timm.create_model("hf-hub:org/name", pretrained=True, num_classes=7, in_chans=1).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.forward_views(torch.randn(2, 1, 32, 32), torch.randn(2, 1, 32, 32)).fused.shape == (2, 7)
    body = hub.load_checkpoint(runs[1]).model.state_dict()["backbone.layer1.0.conv1.weight"]
    assert torch.equal(model.state_dict()["backbone.layer1.0.conv1.weight"], body)


def test_config_and_weights_are_of_one_commit(hub_of, runs, monkeypatch):
    """Somebody pushes between the download of the config and that of the weights."""
    import huggingface_hub

    download, seen = huggingface_hub.hf_hub_download, []

    def push_after_the_first(*arguments, **options):
        path = download(*arguments, **options)
        if not seen:
            hub_of.add("org/name", files_of(runs[0]), "third")
        seen.append(path)
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", push_after_the_first)
    assert same_weights(hub.load_checkpoint("org/name").model, runs[1])


def test_private_gated_and_missing_repositories(hub_of, runs, monkeypatch):
    for name, sentence in (
        ("org/private", "org/private is not on the Hub, or is private; if it is yours, run `hf auth login`"),
        ("org/nothing", "org/nothing is not on the Hub, or is private"),
        ("org/gated", "org/gated is gated; request access"),
    ):
        with pytest.raises(L2R2Error, match=sentence) as caught:
            Predictor.from_pretrained(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same_weights(hub.load_checkpoint("org/private").model, runs[1])


def test_what_is_no_checkpoint_of_ours(hub_of):
    hub_of.add("org/empty", {"README.md": b"nothing"})
    hub_of.add("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04"})
    hub_of.add("org/plain", {"config.json": b'{"architecture": "resnet18"}', "model.safetensors": b"x"})
    for name, sentence in (("empty", r"needs config\.json"), ("pickle", r"model\.safetensors"), ("plain", "no l2r2 section")):
        with pytest.raises(L2R2Error, match=sentence):
            hub.load_checkpoint(f"org/{name}")
    assert hub_of.count("pytorch_model.bin") == 0  # a pickle is not even asked for


def test_a_download_that_breaks_off_continues(hub_of, runs, caplog):
    hub_of.break_downloads = 2
    assert same_weights(hub.load_checkpoint("org/name").model, runs[1])
    assert hub_of.count("GET /cdn/") == 3


def test_a_download_that_never_arrives_leaves_nothing_to_load(hub_of, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub_of.break_downloads = 1000
    with pytest.raises(L2R2Error, match=r"org/name: the download stopped .*; run the same command again to resume it"):
        hub.load_checkpoint("org/name")
    cache = tmp_path / "home" / "hub"
    assert not list(cache.rglob("snapshots/*/model.safetensors"))
    hub_of.break_downloads = 0
    assert same_weights(hub.load_checkpoint("org/name").model, runs[1])


def test_content_with_another_hash_is_refused(hub_of, runs, tmp_path):
    hub_of.damage.add("model.safetensors")
    with pytest.raises(
        L2R2Error, match=r"its SHA-256 differs from the Hub's\); download it again with `hf download org/name --force-download`"
    ):
        hub.load_checkpoint("org/name")
    hub_of.damage.clear()
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/name", "model.safetensors", force_download=True)  # as the sentence says
    assert same_weights(hub.load_checkpoint("org/name").model, runs[1])


def test_predict_from_the_hub_is_predict_from_the_folder(hub_of, runs):
    photo = Image.effect_noise((64, 48), 80).convert("RGB")
    boxes = [[4.0, 4, 40, 40]]
    answers = [Predictor.from_pretrained(source, device="cpu")(photo, boxes).to_dict() for source in ("org/name@v1", runs[0])]
    assert answers[0] == answers[1] and answers[0]["objects"][0]["label"] in COLORS


@pytest.mark.parametrize("name", ["runs/typo", "./typo", "/no/such/run", "~/typo", "a/b/c", "typo", "local-dir:runs/none"])
def test_a_path_that_does_not_exist_never_asks_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("l2r2_models.checkpoints.download.download", lambda name: pytest.fail(f"asked the Hub for {name}"))
    with pytest.raises(L2R2Error, match=r"no such folder; for a repository on the Hub, use hf-hub:org/name"):
        hub.load_checkpoint(name)


@pytest.mark.parametrize("name", ["org/fungi", "org/fungi@main", "hf-hub:runs/typo"])
def test_a_possible_hub_id_is_logged_before_the_hub_is_queried(name, tmp_path, monkeypatch, caplog):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name):
        asked.append((name, [record.message for record in caplog.records]))
        raise L2R2Error("stop")

    monkeypatch.setattr("l2r2_models.checkpoints.download.download", download)
    with caplog.at_level("INFO"), pytest.raises(L2R2Error, match="stop"):
        hub.load_checkpoint(name)
    sentence = f"{name}: no such folder, looking for org/fungi on the Hub"
    assert asked == [(name, [] if name.startswith("hf-hub:") else [sentence])]
