"""Recipe key `cuda_graphs`: trainings with recorded blocks end as those without; where it cannot work, it is refused."""

import copy
import csv
import dataclasses

import pytest
import torch
from recorded_on_cpu import RecordedOnCPU
from safetensors.torch import load_file

from l2r2_models import L2R2Error
from l2r2_models.models.packed_graphs import PackedGraphs
from l2r2_models.train import computation, trainer
from l2r2_models.train.computation import check_device, check_graphs
from l2r2_models.train.finetune import finetune
from l2r2_models.train.losses import BranchLoss
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe

VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
TOKENS, IFAM = "l2r2_masked_vit_small_patch16_224", "ifam_vit_tiny_patch16_224"


def recipe(model=TOKENS, **changes):
    own = {"num_parts": 3} if model == IFAM else {"coverage": 0.1}
    settings = {"size": 32, "epochs": 2, "batch_size": 6, "optimizer": "sgd", "lr": 0.02, "precision": "fp32"}
    return Recipe.default(model, False, backbone={"patch_size": 4, **VIT}, **{**settings, **own, **changes})


@pytest.fixture
def recorded(monkeypatch):
    """A CPU that can record graphs; the list of what was recorded in."""
    made = []

    class Graphs(PackedGraphs):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options, memory=RecordedOnCPU())
            made.append(self)

    monkeypatch.setattr(trainer, "PackedGraphs", Graphs)
    for module in ("finetune", "computation"):
        monkeypatch.setattr(f"l2r2_models.train.{module}.check_device", lambda _: None)
    return made


def trains_alike(dataset, tmp_path, model, changes, bf16):
    """With and without graphs; `bf16` is the tolerance where that rounds in another order."""
    for graphs in (False, True):
        finetune(dataset, recipe(model, cuda_graphs=graphs, **changes), tmp_path / str(graphs))
    weights, expected = (load_file(tmp_path / str(graphs) / "model.safetensors") for graphs in (True, False))
    close = {"rtol": 0.05, "atol": bf16} if "precision" in changes else {"rtol": 1e-3, "atol": 1e-5}
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (TOKENS, {"ema": 0.5, "best_metric": "fg_accuracy"}),
        (TOKENS, {"grad_accumulation": 2, "drop_path": 0.3}),
        (TOKENS, {"branch_backward": "separate"}),
        (TOKENS, {"trainable": "head"}),
        (TOKENS, {"precision": "bf16"}),
        (IFAM, {"grad_accumulation": 3}),
        (IFAM, {"consistency": 1.0}),
    ],
)
def test_the_weights_are_those_of_a_training_without_graphs(recorded, dataset, tmp_path, model, changes):
    trains_alike(dataset, tmp_path, model, changes, bf16=2e-3)
    (graphs,) = recorded
    assert graphs.memory.replayed >= graphs.memory.recorded > 0 and not graphs.memory.busy


def test_a_last_batch_that_is_smaller_runs_eagerly(recorded, dataset, tmp_path):
    finetune(dataset, recipe(batch_size=8, epochs=1, cuda_graphs=True), tmp_path / "run")  # 12 rows: 8 and 4
    (graphs,) = recorded
    assert graphs.batch == 8 and graphs.memory.replayed == 2, "forward and backward, of the first batch"


def test_an_interrupted_training_goes_on_with_graphs(recorded, dataset, tmp_path, monkeypatch):
    """Objects of all sizes, and dropout in the blocks, which draws a number for each row of a graph."""
    rows = list(csv.DictReader((dataset / "metadata.csv").read_text().splitlines()))
    with open(dataset / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow({**row, "x0": 0, "y0": 0, "x1": 5 + 5 * (number % 12), "y1": 40 - 3 * (number % 2)})
    settings = recipe(cuda_graphs=True, ema=0.5, batch_size=2)
    settings = dataclasses.replace(settings, backbone={**settings.backbone, "proj_drop_rate": 0.3})
    finetune(dataset, settings, tmp_path / "whole")
    save = trainer.BranchTrainer._save_checkpoint

    def killed(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.BranchTrainer, "_save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, settings, tmp_path / "run")
    monkeypatch.setattr(trainer.BranchTrainer, "_save_checkpoint", save)
    finetune(dataset, settings, tmp_path / "run")
    whole, continued = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[key], continued[key]) for key in whole)
    first = [next(iter(graphs._runners)) for graphs in recorded]
    assert len(recorded[0]._runners) > 1 and first[0] != first[2], "batches of other sizes come first after the resume"


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("model", [TOKENS, IFAM])
def test_gradients_under_distributed_data_parallel(one_process, model):
    """Its hooks are on the parameters, from before anything is recorded, and fire once per step."""
    torch.manual_seed(0)
    net = create_model(recipe(model), 3).train()
    twin = copy.deepcopy(net)
    graphs = PackedGraphs(net.backbone_of("fg"), 4, training=True, memory=RecordedOnCPU())
    ours = torch.nn.parallel.DistributedDataParallel(BranchLoss(net), find_unused_parameters=True)
    theirs = BranchLoss(twin)
    for step in range(3):
        batch = {"labels": torch.tensor([0, 1, 2, 0]), "has_fg": torch.ones(4, dtype=torch.bool)}
        batch["full"] = torch.randn(4, 3, 32, 32)
        if model == TOKENS:
            batch["mask"] = torch.zeros(4, 32, 32)
            batch["mask"][:, 4:20, 8:28] = 1
        for loss, used in ((ours, True), (theirs, False)):
            loss.zero_grad()
            torch.manual_seed(step)  # stage 1 of an iFAM model draws
            if used:
                with graphs.replayed():
                    loss(**batch)["loss"].backward()
            else:
                loss(**batch)["loss"].backward()
        for (name, got), expected in zip(net.named_parameters(), twin.parameters()):
            if expected.grad is not None:
                torch.testing.assert_close(
                    got.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
                )
    assert graphs.memory.recorded == 2 and graphs.memory.replayed == 6


def test_refusals(monkeypatch):
    with pytest.raises(L2R2Error, match="cuda_graphs stores the activations that grad_checkpointing computes again"):
        recipe(cuda_graphs=True, grad_checkpointing=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(L2R2Error, match=r"cuda_graphs needs a GPU; leave it out\."):
        check_device(recipe(cuda_graphs=True))
    crops = Recipe.default("timm:test_vit", False, size=32, cuda_graphs=True)
    monkeypatch.setattr(computation, "check_device", lambda _: None)
    with pytest.raises(L2R2Error, match="cuda_graphs has no effect unless fg drops tokens"):
        computation.resolve(crops, create_model(crops, 3), {})
    for model in (TOKENS, IFAM):
        check_graphs(create_model(recipe(model), 3))


@pytest.mark.gpu
@pytest.mark.parametrize("model", [TOKENS, IFAM])
@pytest.mark.parametrize("changes", [{}, {"grad_accumulation": 2, "ema": 0.5}, {"precision": "bf16"}, {"workers": 2}])
def test_trainings_on_a_gpu(dataset, tmp_path, model, changes):
    trains_alike(dataset, tmp_path, model, changes, bf16=5e-3)
