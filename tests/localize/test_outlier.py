"""The outlier localizer: equal to scikit-learn's statistics, exact on planted objects, and silent where nothing stands out."""

import numpy as np
import pytest
import torch
from conftest import write_run
from PIL import Image
from torch import nn

from l2r2_models import ViewSpec
from l2r2_models.localize import create_localizer
from l2r2_models.localize.outlier import SHRINKAGE, border_distance, outlier_score


@pytest.mark.parametrize(("channels", "height", "width", "thickness"), [(3, 9, 12, 1), (40, 8, 8, 1), (5, 32, 40, 2)])
def test_distances_are_those_of_scikit_learns_shrunk_covariance(channels, height, width, thickness):
    from sklearn.covariance import ShrunkCovariance

    torch.manual_seed(0)
    features = torch.randn(channels, height, width) * torch.rand(channels, 1, 1)
    edge = np.ones((height, width), dtype=bool)
    edge[thickness:-thickness, thickness:-thickness] = False
    patches = features.flatten(1).T.double().numpy()
    expected = ShrunkCovariance(shrinkage=SHRINKAGE).fit(patches[edge.flatten()]).mahalanobis(patches)
    np.testing.assert_allclose(border_distance(features).flatten(), np.sqrt(expected), rtol=1e-4)


def test_every_map_must_agree():
    """An object that one map alone shows counts less than one that all of them show."""
    torch.manual_seed(0)
    fine, coarse = torch.randn(4, 16, 16), torch.randn(6, 8, 8)
    fine[:, 2:4, 2:4] += 12
    fine[:, 8:10, 8:10] += 12
    coarse[:, 4, 4] += 12
    score = outlier_score([fine, coarse])
    assert score.shape == (16, 16) and score[8:10, 8:10].min() > 2 * score[2:4, 2:4].max() > 0


class Colors(nn.Module):
    """A network whose maps of strides 4, 8 and 16 are the image itself, averaged over cells."""

    def __init__(self):
        super().__init__()
        self.feature_info = [{"reduction": stride, "module": "pool", "num_chs": 3} for stride in (2, 4, 8, 16, 32)]

    def forward_intermediates(self, x, indices, output_fmt, intermediates_only):
        assert indices == [1, 2, 3]
        return [nn.functional.avg_pool2d(x, self.feature_info[i]["reduction"]) for i in indices]


@pytest.fixture
def localizer(tmp_path):
    localizer = create_localizer(f"outlier:{write_run(tmp_path / 'run')}?size=256", device="cpu")
    localizer.model.backbone = Colors()
    localizer.model.view_spec = ViewSpec(size=256, fill=(255, 0, 255))  # padding in the most striking color
    return localizer


@pytest.mark.parametrize("size", [(512, 256), (256, 512), (256, 256)])
def test_the_box_is_in_pixels_of_the_image_and_padding_is_no_object(localizer, size):
    noise = np.random.default_rng(0).normal(0, 8, (size[1], size[0], 3))
    image = Image.fromarray((noise + np.array([60, 120, 60])).clip(0, 255).astype("uint8"))
    image.paste((200, 30, 30), (96, 64, 160, 160))
    (found,) = localizer([image])
    assert found.scores.tolist() == [1.0] and found.image_size == (size[1], size[0])
    assert (found.boxes[0] - torch.tensor([96, 64, 160, 160])).abs().max() <= 32


def test_an_image_of_one_color_has_no_object(localizer):
    (found,) = localizer([Image.new("RGB", (256, 256), (90, 90, 90))])
    assert len(found) == 0
    nearly = np.random.default_rng(0).integers(90, 93, (200, 256, 3))
    (found,) = localizer([Image.fromarray(nearly.astype("uint8"))])
    assert len(found) == 0


def test_without_a_source_it_is_efficientnet_lite0(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    assert str(create_localizer("outlier?size=256", device="cpu").spec) == "outlier:timm:tf_efficientnet_lite0.in1k"
