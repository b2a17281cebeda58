"""lattejax: LaTtE-Flow, layerwise timestep-expert flow matching, in JAX and Flax."""
