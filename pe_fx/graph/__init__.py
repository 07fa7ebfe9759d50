"""Reading a model: `capture` makes one flat graph of it, `Flow` reads the graph as operations on values and the weights they apply.

`inputs` says what a model takes, `plain` opens what a graph wraps, `ops` names every operation, `views` and `channels` follow
channel numbers (`tags`) through them, `weights` finds the parameter behind an operand, `walks` are ways through any graph. Nothing
here knows a rule or a tied module. Rules (`pe_fx.passes`) import `flow` and what it speaks of: `operation`, `ops`, `channels`, `tags`;
others import `capture`, `inputs`, and for a graph's nodes `ops` and `views`.
"""
