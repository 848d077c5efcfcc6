"""Policy optimisation as plain functions: arrays and numbers in, arrays and numbers out.

advantages and aggregation run on the host (numpy) over the whole optimizer batch; ratios, kl,
correction and loss run on the device (jax) over one micro-batch of packed rows.
"""
