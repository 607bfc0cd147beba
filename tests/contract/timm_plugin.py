"""pytest plugin that points timm's own tests/test_models.py, unchanged, at the zoo: `pytest -p timm_plugin TEST_FILE`.

timm's file lists its models through `timm.list_models` with filters by name and by module, e.g. `vit_*` where a ViT has
another output layout. Each filter is extended to our names, and only our names are listed. L2R2_TIMM_MODELS narrows them.
"""

import fnmatch
import os

import timm

import l2r2_models  # noqa: F401  (registers the models)

_list_models = timm.list_models


def _ours(patterns):
    if not patterns:
        return patterns
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return patterns + [prefix + p for p in patterns if not p.startswith("*") for prefix in ("l2r2_", "l2r2_masked_", "ifam_")]


def list_models(filter="", module="", pretrained=False, exclude_filters="", **kwargs):
    names = _list_models(_ours(filter), "registry", pretrained, _ours(exclude_filters), **kwargs)
    wanted = os.environ.get("L2R2_TIMM_MODELS", "l2r2_*,ifam_*").split(",")
    return [n for n in names if any(fnmatch.fnmatch(n.split(".")[0], w) for w in wanted)]


timm.list_models = list_models
timm.list_pretrained = lambda *args, **kwargs: []  # timm's inference test downloads reference outputs
