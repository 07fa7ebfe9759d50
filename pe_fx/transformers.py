"""Tied models of transformers: saved and loaded as any other.

    import pe_fx.transformers

    model = AutoModel.from_pretrained(folder, quantization_config=pe_fx.transformers.PeFxConfig(mix="signed"))
    model.save_pretrained(tied)                # the tied weights, and in config.json the plan
    model = AutoModel.from_pretrained(tied)    # built tied: there is no dense copy on the way

A model that `pe_fx.transform` or `pe_fx.apply` ties is saved so, too. The weights are written in the library's own way, by its
extension point for methods that change how weights are kept (`register_quantizer`); nothing is quantized.

Where this module is not imported, a dense class would fill in random values for what is tied away. So each tied weight's name is in
the file, with an empty tensor that has the shape of no weight: `from_pretrained` refuses it, and its report tells to import this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

try:
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"pe_fx.transformers needs transformers 5 or newer ({error}): pip install 'pe_fx[transformers]'") from error

import pe_fx
from pe_fx import checkpoint
from pe_fx.api import checked
from pe_fx.tied.held import held_plan
from pe_fx.tied.read_only import ReadOnly
from pe_fx.tied.weight import TOLD, placeholder, tied_weights_in

METHOD = "pe_fx"

ReadOnly._is_hf_initialized = True  # type: ignore[attr-defined]  # what transformers' init functions ask: a tied weight's values are its source's


@register_quantization_config(METHOD)
class PeFxConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a model is tied when it is loaded.

    >>> PeFxConfig(mix="signed", rules=["mlp"]).to_dict()
    {'quant_method': 'pe_fx', 'options': {'mix': 'signed', 'rules': ['mlp']}, 'init': 'keep', 'plan': None}

    Takes the options of `pe_fx.plan`, and `init`; or a plan made before, a `pe_fx.Plan` or its JSON as a dict: then it ties by that, as a
    folder does that holds tied weights. Raises `PeFxError` for options that are wrong or cannot be written as JSON.
    """

    def __init__(
        self,
        plan: pe_fx.Plan | Mapping[str, Any] | None = None,
        *,
        init: str = "keep",
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        more.pop("quant_method", None)
        self.quant_method: Any = METHOD
        self.options = {**(options or {}), **more}
        self.init = init
        self.plan = json.loads(plan.to_json()) if isinstance(plan, pe_fx.Plan) else plan
        checked(init, self.options)
        try:
            json.dumps(self.options)
        except TypeError as error:
            raise pe_fx.PeFxError(f"an option of PeFxConfig goes to config.json, so rules are named there ({error})") from error

    @property
    def made_plan(self) -> pe_fx.Plan | None:
        return None if self.plan is None else pe_fx.Plan.from_json(json.dumps(self.plan))


@register_quantizer(METHOD)
class PeFxQuantizer(HfQuantizer):  # type: ignore[misc]
    """What `from_pretrained` and `save_pretrained` ask, at each step."""

    quantization_config: PeFxConfig
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any) -> None:
        """Ties a model without values by the plan of the folder that it is loaded from."""
        plan = self.quantization_config.made_plan
        if plan is not None and self.pre_quantized:
            refuse_dense(plan, checkpoint_files or ())
            plan = fitting(plan, model)
            pe_fx.apply(model, plan, inplace=True)
            prefix = f"{model.base_model_prefix}."  # which the file's names may lack
            told = {rf"(^|\.){re.escape(tie.target.removeprefix(prefix))}$" for tie in plan.ties} | {f"{re.escape(TOLD)}$"}
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *told}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Ties a model that was loaded dense. It is none that is quantized: it converts, moves and trains as before."""
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        if not self.pre_quantized:
            away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
            if away is not None:
                raise pe_fx.PeFxError(
                    f"{type(model).__name__} is loaded with {away} offloaded: nothing can be tied to it. Load it without device_map or "
                    "with one that has room, tie it and save it; the tied folder loads with any device_map"
                )
            config = self.quantization_config
            plan = config.made_plan
            pe_fx.apply(model, plan or pe_fx.plan(model, **config.options), init=config.init, inplace=True)
        attach(model, self)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What is written: the state_dict, with an empty tensor under the name of each tied weight; the plan goes to config.json, too."""
        plan = held_plan(model)
        if plan is None:  # untied since
            self.remove_quantization_config(model)
            return None, {}
        self.quantization_config.plan = json.loads(plan.to_json())
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        empty = {full: placeholder(getattr(module, name)) for full, module, name, _ in tied_weights_in(model)}
        first = next(iter(empty))
        return {**model.state_dict(), **empty, f"{first} {TOLD}": empty[first].clone()}, {checkpoint.PLAN: plan.to_json()}

    def _dequantize(self, model: Any, dtype: Any = None) -> nn.Module:
        return pe_fx.untie(model)


def attach(model: nn.Module, quantizer: PeFxQuantizer | None = None) -> None:
    """Lets `save_pretrained` of a tied model write it as such."""
    if isinstance(model, PreTrainedModel) and (quantizer is not None or getattr(model, "hf_quantizer", None) is None):
        model.hf_quantizer = quantizer or PeFxQuantizer(PeFxConfig(), pre_quantized=True)


def fitting(plan: pe_fx.Plan, model: nn.Module) -> pe_fx.Plan:
    """The plan by the model's names, which have a prefix where a base model's file is loaded into a model with a head, or the reverse."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    targets = [tie.target for tie in plan.ties]
    if all(prefix + name in names for name in targets):
        return plan.renamed(lambda name: prefix + name)
    if not any(name in names for name in targets) and all(name.removeprefix(prefix) in names for name in targets):
        return plan.renamed(lambda name: name.removeprefix(prefix))
    return plan


def refuse_dense(plan: pe_fx.Plan, files: Sequence[str]) -> None:
    """Raises `PeFxError` where the folder's weights are dense, whatever its config.json says."""
    targets = {tie.target for tie in plan.ties}
    for path in files:
        values = checkpoint.read(path, device="meta").values
        for name in targets.intersection(values):
            if values[name].numel():
                raise pe_fx.PeFxError(
                    f"{path} holds a dense {name}, which is tied in the plan of its config.json: take `quantization_config` out of "
                    "config.json to load it dense"
                )
