"""Sampling: slots refilled between jitted decode chunks, and the thread that drives them."""
