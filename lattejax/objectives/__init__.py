"""The losses: flow matching for what draws, and language modelling of answers for what reads.

A loss takes (trained parameters, frozen inputs, batch, keys) and returns a scalar and a dict of metrics. A batch has
one or both of two streams, "images" to be drawn and "questions" to be answered, these weighed as a whole batch by
`weigh_answers`; `keys` has a key for each row of each.
Rows stand on the leading axis, or on two, [K, b], where each group has rows of its own (`parallel.rows`). A loss is a
mean over rows, so that the losses of micro-batches average to that of their batch.

Axes: K group, b rows of one group's share, U prompts of a table, T token, C latent channel.
"""
