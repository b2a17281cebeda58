"""On the path of processes that tests start: hides PyTorch, which users do not need and which loads slowly, and the
packages in the variable HIDDEN_PACKAGES."""

import os
import sys
from importlib.machinery import PathFinder

HIDDEN = {"torch", *os.environ.get("HIDDEN_PACKAGES", "").split()}


class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname in HIDDEN else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
