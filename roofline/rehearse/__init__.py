"""Compiles the programs of a run for GPUs that are not there, and reads what they will need.

    python -m roofline.rehearse --config qwen3_4b_math_8gpu --hardware h200 --devices 8

Nothing runs: XLA compiles for a described device (`roofline/targets`, one file per card), which takes
the CUDA plug-in of jax but no GPU. From each executable come peak memory, collectives, kernels and
transfers to the host, beside what `roofline.cost` and `roofline.memory` say; its time is the sum of
its own operators' times (`roofline.operators`).

    target       the devices to compile for
    executable   one compiled program, read
    timing       seconds of its operators
    compare      predicted | compiled | ratio, line by line

The programs are the trainer's, which stands to the right of this package: the command runs
`jaxrl.rehearse`, by name. This package and `roofline.calibrate` are the only
parts of `roofline` that import jax.
"""
