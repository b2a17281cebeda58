"""On the path of the processes that tests start: hides PyTorch, which users need not have and which loads slowly,
and what the variable HIDDEN_PACKAGES names."""

import os
import sys
from importlib.machinery import PathFinder

HIDDEN = {"torch", *os.environ.get("HIDDEN_PACKAGES", "").split()}


class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname in HIDDEN else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
