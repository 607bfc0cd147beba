"""A network of color detectors whose evidence is known: full uses the ground, fg the object."""

from dataclasses import replace
from pathlib import Path

import timm
import torch
from audit_cases import GROUNDS, OBJECTS, SIDE
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from l2r2_models.checkpoints.checkpoint import save_checkpoint
from l2r2_models.views import ViewSpec


class Spots(nn.Module):
    """One feature for each color of `OBJECTS` and `GROUNDS`, on a grid of 8x8, pooled by the mean."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3, **_) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, 6, 6
        self.feature_info = [dict(num_chs=6, reduction=4, module="conv")]
        self.conv = nn.Conv2d(in_chans, 6, 1)
        self.fc = nn.Linear(6, num_classes) if num_classes else nn.Identity()
        colors = torch.tensor([*OBJECTS.values(), *GROUNDS.values()]) / 127.5 - 1
        with torch.no_grad():
            self.conv.weight.copy_((colors / colors.norm(dim=1, keepdim=True))[..., None, None])
            self.conv.bias.fill_(-0.6)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool=None) -> None:
        self.num_classes, self.fc = num_classes, nn.Linear(6, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(self.conv(x).relu(), 4)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


_cfg = dict(input_size=(3, SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=3, classifier="fc", first_conv="conv")
default_cfgs = generate_default_cfgs({"explain_spots.cases": _cfg})


@register_model
def explain_spots(pretrained=False, **kwargs):
    return build_model_with_cfg(Spots, "explain_spots", pretrained, **kwargs)


def spots(fusion: str = "average", **options):
    """`full` is sure of its class where it sees its ground, `fg` where it sees its object, which lies in half of its view."""
    views = ViewSpec(size=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3, fill=(128, 128, 128), interpolation="bilinear", margin=0.5)
    model = timm.create_model("l2r2", backbone="explain_spots", num_classes=3, views=views, fusion=fusion, **options).eval()
    with torch.no_grad():
        for branch, first in (("full", 3), ("fg", 0)):
            if branch in model.heads:
                model.heads[branch].weight.zero_()
                model.heads[branch].bias.zero_()
                model.heads[branch].weight[:, first : first + 3] = 20 * torch.eye(3)
    return model


def write_spots(folder: Path, fusion: str = "average", **views) -> Path:
    model = spots(fusion)
    model.view_spec = replace(model.view_spec, **views)
    save_checkpoint(model, folder, list(OBJECTS))
    return folder
