"""The losses: flow matching for the generation pathway, and language modelling of answers for the VLM.

A loss takes (trained parameters, frozen inputs, batch, keys) and returns a scalar and a dict of metrics. A batch has
one or both of two streams: "images" to draw and "questions" to answer. `weigh_answers` sets the questions' weights from
the complete batch. `keys` has a PRNG key for each row of each stream.
Rows are on the leading axis, or on two axes [K, b] if each group has its own rows (`parallel.rows`). A loss is a mean
over rows, so that the losses of micro-batches average to that of their batch.

Axes: K group, b rows of one group's share, U prompts of a table, T token, C latent channel.
"""
