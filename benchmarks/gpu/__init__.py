"""The GPU suite: every phase predicted, measured and compared with PyTorch, on one device.

    suite     the command: which cases are left, one process after another, each result stored at once
    cases     what is measured, at which shapes; no jax
    worker    the process that runs cases: phases (jaxrl's own programs one by one), grpo (whole steps)
    protocol  how the suite and that process speak
    measure   warm-up, repeats, predictions, peak memory
    profile   the most expensive kernels of a case, from a profiler trace
    peers_torch   the same shapes in transformers and PyTorch
    store     the results file; report   its tables and the figures to reach
Needs jax, flax, optax and numpy; torch and transformers for the peers.
"""
