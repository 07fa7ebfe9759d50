"""Reading a model: `capture` makes one flat graph of it, `Flow` reads the graph as operations on values and the weights they apply.

`inputs` says what a model takes, `plain` opens what a graph wraps, `ops` names every operation, `views` and `channels` follow
channel numbers through them, `weights` finds the parameter behind an operand. Nothing here knows a rule or a tied module: rules
(`pe_fx.passes`) and whoever captures a graph import `capture`, `flow` and what `flow` hands out (`ops`, `operation`, `channels`, `tags`).
"""
