import os

# transformers is only used for tokenizers and image processors. Set before its import, this silences the warning that
# PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
