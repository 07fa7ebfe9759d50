"""Rewriting a model: a `Plan` becomes tied modules, whose weight is a view of another module's, or a graph that reads views.

`weight` is the tied module and the layout of its weight, `owners` who holds a parameter and which ties it forbids, `rewrite` carries
a plan out, `entry` treats the first block of a stage, `held` reads the plan back from a tied model, `twin` makes the dense
model again and compares the two. All of it may be imported by whoever handles a tied model; nothing here looks for patterns.
"""
