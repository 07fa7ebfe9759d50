"""The models of the tables of arXiv 2401.16438 that timm lacks, at the paper's sizes, each as a package on PyPI has it.

Their published numbers of parameters, in millions: PVT 13.2, 24.5, 44.2, 61.4; CvT 20.0, 31.5; T2T-ViT 21.5, 39.2, 64.1.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from zoo import Entry
from zoo import entry as entry_of

PVT = {"pvt_tiny": (2, 2, 2, 2), "pvt_small": (3, 4, 6, 3), "pvt_medium": (3, 4, 18, 3), "pvt_large": (3, 8, 27, 3)}
CVT = {"cvt_13": (1, 2, 10), "cvt_21": (1, 4, 16)}
T2T_VIT = {"t2t_vit_14": 14, "t2t_vit_19": 19, "t2t_vit_24": 24}
PACKAGES = dict.fromkeys((*PVT, *CVT), "transformers") | dict.fromkeys(T2T_VIT, "mmpretrain")


def names() -> list[str]:
    """Those whose package is installed; of the others it is said that they are left out."""
    absent = {package for package in PACKAGES.values() if importlib.util.find_spec(package) is None}
    for package in absent:
        print(f"{package} is not installed: {', '.join(name for name in PACKAGES if PACKAGES[name] == package)} left out", file=sys.stderr)
    return [name for name, package in PACKAGES.items() if package not in absent]


def entry(name: str) -> Entry:
    return entry_of(_builder(name), (3, 224, 224), name.partition("_")[0])


def _builder(name: str) -> Callable[..., nn.Module]:
    if name in T2T_VIT:
        import mmpretrain

        return lambda: mmpretrain.get_model(f"t2t-vit-t-{T2T_VIT[name]}_8xb64_in1k", pretrained=False)
    if name in PVT:
        return lambda: _classifier(transformers.PvtConfig(depths=PVT[name], num_labels=1000))
    return lambda: _classifier(transformers.CvtConfig(depth=CVT[name], num_labels=1000))


def _classifier(configuration: Any) -> nn.Module:
    model: nn.Module = transformers.AutoModelForImageClassification.from_config(configuration)
    return model
