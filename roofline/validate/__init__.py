"""Predictions scored on measured cases: `python -m roofline.validate --cases DIR`.

`kinds` says what one kind of case is; `kernels` and `end_to_end` hold the kinds; `score` computes
errors, baselines and the per-stack calibration; `__main__` reads, prints and names the kinds.
"""
