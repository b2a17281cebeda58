"""lattejax: LaTtE-Flow, layerwise timestep-expert flow matching, in JAX and Flax."""

__version__ = "0.1.0"
