"""L2R2: image classifiers that look at the object first, as timm models. Importing this package registers them.

>>> import timm, l2r2_models
>>> model = timm.create_model("l2r2_resnet18", num_classes=5)
>>> model.branches
('full', 'fg')
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .boxes.detections import Detections
from .errors import L2R2Error
from .fusion import create_fusion
from .images import ImageError, load_image
from .models import registry as _registry  # registers the models
from .models.ifam import IFAM
from .models.l2r2 import L2R2, L2R2Output
from .views import Views, ViewSpec, make_views

if TYPE_CHECKING:
    from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint
    from .evaluate.evaluator import evaluate_run
    from .explain.explainer import Explainer
    from .predict.prediction import Prediction
    from .predict.predictor import Predictor
    from .predict.zero_shot import ZeroShotL2R2
    from .train.finetune import finetune
    from .train.recipe import Recipe

__version__ = "0.1.0"
_LAZY = {  # imported on first access
    "Checkpoint": "checkpoints",
    "Explainer": "explain.explainer",
    "Prediction": "predict.prediction",
    "Predictor": "predict.predictor",
    "Recipe": "train.recipe",
    "ZeroShotL2R2": "predict.zero_shot",
    "evaluate_run": "evaluate.evaluator",
    "finetune": "train.finetune",
    "load_checkpoint": "checkpoints",
    "save_checkpoint": "checkpoints",
}
__all__ = [
    "IFAM",
    "L2R2",
    "Checkpoint",
    "Detections",
    "Explainer",
    "ImageError",
    "L2R2Error",
    "L2R2Output",
    "Prediction",
    "Predictor",
    "Recipe",
    "ViewSpec",
    "Views",
    "ZeroShotL2R2",
    "create_fusion",
    "evaluate_run",
    "finetune",
    "list_models",
    "load_checkpoint",
    "load_image",
    "make_views",
    "save_checkpoint",
]


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """List the registered models, sorted; `timm.list_models` restricted to this package.

    Args:
        pattern: shell pattern of the names, e.g. `"l2r2_vit*"`.
        pretrained: list every pretrained tag instead of the architectures.

    >>> list_models("l2r2_resnet*")
    ['l2r2_resnet18', 'l2r2_resnet50']
    """
    return _registry.list_models(pattern, pretrained)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
