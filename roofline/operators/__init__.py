"""Seconds of single operators on a GPU, from a few fitted numbers each; see `model`."""
