"""The rules as torch.fx passes, for a PassManager."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from pe_fx.api import Share, apply, plan
from pe_fx.graph.inputs import ExampleInputs
from pe_fx.passes import DEFAULT_RULES, Rule


class TiePass(PassBase):
    """Ties a GraphModule in place by the given rules, one or several.

    >>> from torch import nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    >>> result = TiePass(["mlp"])(gm)
    >>> result.modified, result.graph_module is gm, TiePass(["mlp"])(gm).modified
    (True, True, False)

    A graph whose nodes carry their values (from torch.export or Dynamo) is read as it is; for another, `example_inputs` are
    needed where they cannot be derived. Raises `PeFxError` as `pe_fx.plan` does.
    """

    def __init__(self, rules: Sequence[str | Rule] = DEFAULT_RULES, example_inputs: ExampleInputs | None = None, share: Share = ()) -> None:
        super().__init__()
        self.rules = rules
        self.example_inputs = example_inputs
        self.share = share

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        made = plan(graph_module, self.example_inputs, rules=self.rules, share=self.share)
        if made.sites:
            apply(graph_module, made, inplace=True)
        return PassResult(graph_module, bool(made.sites))
