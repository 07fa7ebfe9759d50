"""The command `pe-fx`: `commands` reads options and shows what came out, `jobs` does the work, `specs` builds the model that a SPEC names.

`forms` holds what the help shows. `commands` and `forms` import without torch, so that help and completion come at once.
Nothing imports from here but `pe_fx.__main__`.
"""
