"""A stand-in of lmms-eval 0.7.3: the part of its interface that a model uses. `in_lmms_eval.py` compares the two."""
