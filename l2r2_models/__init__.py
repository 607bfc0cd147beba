"""L2R2: image classifiers that look at the object first, as timm models. Importing this package registers them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .boxes.detections import Detections
from .errors import L2R2Error
from .images import ImageError, load_image
from .models import registry as zoo  # registers the models
from .models.ifam import IFAM
from .models.l2r2 import L2R2, L2R2Output
from .views import Views, ViewSpec, make_views

if TYPE_CHECKING:
    from .explain.explainer import Explainer
    from .predict.prediction import Prediction
    from .predict.predictor import Predictor

__version__ = "0.1.0"
__all__ = [
    "IFAM", "L2R2", "Detections", "Explainer", "ImageError", "L2R2Error", "L2R2Output", "Prediction", "Predictor", "ViewSpec",
    "Views", "load_image", "make_views", "zoo",
]  # fmt: skip

_LAZY = {"Explainer": ".explain.explainer", "Predictor": ".predict.predictor", "Prediction": ".predict.prediction"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
