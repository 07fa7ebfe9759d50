"""The command `pe-fx`: `commands` reads options and shows what came out, `jobs` does the work, `specs` builds the model that a SPEC names:
`exported` reads exported programs as data, `home` keeps the modules of one folder from those of another.

`options` states what several commands take, `forms` what the help shows, `progress` keeps stderr to what the command says itself. These and
`commands` import without torch, so that help and completion come at once. Nothing imports from here but `pe_fx.__main__`.
"""
