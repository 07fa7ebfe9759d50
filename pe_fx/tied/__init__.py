"""Rewriting a model: a `Plan` becomes tied modules, whose weight is a view of another module's, or a graph that reads views.

`rewrite_modules` and `rewrite_graph` carry a plan out, by the same `layouts`; `weight` is the tied module, `derived` its class, `entry`
what the first block of a stage gets. `owners` says who holds a parameter and which ties it forbids, `held` reads the plan back from a
tied model, `twin` makes the dense model again and compares the two. Whoever handles tied models may import all of it.
"""
