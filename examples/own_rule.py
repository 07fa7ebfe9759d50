"""A rule of one's own, queries and keys made by one matrix as in the Reformer (arXiv 2001.04451):  python examples/own_rule.py"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import BertConfig, BertModel

import pe_fx
from pe_fx.graph.flow import Flow
from pe_fx.graph.ops import Kind
from pe_fx.passes.pairs import common_module
from pe_fx.ties import Miss, Site, Tie


class SharedQK:
    """`key.weight ← query.weight` where each is a whole matrix and both have one shape."""

    kind = "shared_qk"

    def match(self, flow: Flow) -> Iterator[Site | Miss]:
        for attention in (op for op in flow.ops if op.kind is Kind.ATTEND):
            makers = [value and flow.feeder(value) for value in attention.operands[:2]]
            q, k = (maker.weight if maker else None for maker in makers)
            if q is None or k is None or q.name in flow.claimed or k.name in flow.claimed:
                continue
            names = (q.name, k.name)
            if q.name != k.name and q.is_whole_matrix and k.is_whole_matrix and q.block.shape == k.block.shape:
                yield Site(self.kind, common_module(names), names, (Tie(into=k.block, of=q.block, transposed=False),))
            else:
                yield Miss(self.kind, common_module(names), names, f"{q.block} and {k.block} are no two matrices of one shape")


def main() -> None:
    model = BertModel(BertConfig(num_hidden_layers=2))
    plan = pe_fx.plan(model, rules=[SharedQK(), "mlp"])
    print(plan)
    print(pe_fx.verify(pe_fx.apply(model, plan)))


if __name__ == "__main__":
    main()
