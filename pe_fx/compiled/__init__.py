"""torch.compile: `backend` ties the graphs that Dynamo hands over, and lowers them through Inductor.

`ledger` remembers which parameters compiled graphs have tied, and gives the ties to the model (`commit`, `pending`), `dynamo` holds what
Dynamo and Inductor tell in private alone, `lowering` the passes on the joint graph of forward and backward; `fx_pass` is one of torch.fx.
Users name the backend, and import `commit`, `pending` and `TiePass` from `pe_fx`; nothing else is meant for import.
"""
