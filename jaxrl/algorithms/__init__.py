"""Policy optimisation as plain functions: arrays and numbers in, arrays and numbers out.

config says what there is to choose. advantages, aggregation, rewards and shaping run on the host (numpy)
over the whole optimizer batch; ratios, kl, correction, segments, loss and preference run on the device
(jax) over one micro-batch of packed rows.
"""
