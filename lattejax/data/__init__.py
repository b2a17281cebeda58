import os

# transformers serves tokenizers and image processors here; unless told so before its import, it warns that it finds no
# PyTorch.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
