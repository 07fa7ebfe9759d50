"""torch.compile: `backend` ties the graphs that Dynamo hands over, and lowers them through Inductor.

`ledger` remembers which parameters compiled graphs have tied, and gives the ties to the model (`commit`, `pending`), `dynamo` holds all
that is private to PyTorch, `lowering` the passes on the joint graph of forward and backward. Users reach the backend by its name
and import `commit` and `pending` from `pe_fx`; nothing else is meant for import.
"""
