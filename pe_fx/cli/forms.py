"""How models and kinds of sites are written on the command line; its help shows them without importing torch."""

FORMS = (
    "timm:NAME, torchvision:NAME, transformers:MODEL_TYPE, diffusers:CLASS, hf:FOLDER, package.module:callable, path/file.py:callable "
    "or model.pt2"
)

CODE = "A callable is Python code, which runs; model.pt2 and hf:FOLDER are read as data alone, unless --trust."

WEIGHTS = ".safetensors, .pt or .bin, or the .index.json of several"

KINDS = ("mlp", "glu", "attention", "bottleneck", "squeeze_excite")
