"""The recipe key sync_batch_norm: what it converts, what it refuses, and that checkpoints do not know of it."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2r2_models import L2R2Error
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.train.computation import synchronize_batch_norm
from l2r2_models.train.finetune import finetune
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe


def recipe(model, **changes):
    return Recipe.default(model, False, **{"size": 32, "epochs": 1, "batch_size": 6, "sync_batch_norm": True, **changes})


@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:test_efficientnet"])  # torch's batch norm, and timm's with activation
def test_every_batch_norm_is_synchronized_and_the_checkpoint_is_a_plain_one(tmp_path, name):
    model = create_model(recipe(name), 3).eval()
    plain = copy.deepcopy(model)
    synchronize_batch_norm(model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert [type(module) for module in plain.modules()] != [type(module) for module in model.modules()]
    save_checkpoint(model, tmp_path / "run", ["a", "b", "c"])
    loaded = load_checkpoint(tmp_path / "run").model
    assert [type(module) for module in loaded.modules()] == [type(module) for module in plain.modules()]
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded(image), plain(image)) and torch.equal(model(image), plain(image))


def test_on_a_cpu_it_works_for_one_process_and_is_refused_for_several(dataset, tmp_path):
    assert finetune(dataset, recipe("timm:resnet10t"), tmp_path / "one").metrics
    command = ["finetune", dataset, "--model", "timm:resnet10t", "--no-pretrained", "--size", 32, "--set=sync_batch_norm=true"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "l2r2_models"]
    two = subprocess.run(
        [sys.executable, *torchrun, *map(str, command), "-o", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert two.returncode != 0 and two.stderr.count("error: sync_batch_norm needs a GPU per process") == 1, two.stderr
    assert "run the same command" not in two.stderr and not (tmp_path / "two").exists()


def test_it_is_refused_where_it_would_do_nothing(dataset, tmp_path):
    with pytest.raises(L2R2Error, match="test_vit has no batch norm; leave sync_batch_norm out"):
        finetune(dataset, recipe("timm:test_vit"), tmp_path / "run")
    with pytest.raises(L2R2Error, match="no effect with trainable=head"):
        recipe("timm:resnet10t", trainable="head")
