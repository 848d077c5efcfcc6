"""Measurements of jaxrl, alone and beside other systems. See benchmarks/README.md."""
