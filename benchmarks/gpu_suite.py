"""The GPU suite by one command: python benchmarks/gpu_suite.py [--minutes 8] [--only decode,train,...]

See `benchmarks.gpu.suite`; this file only makes the command work from any folder, without an installation.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder

from benchmarks.gpu.suite import main  # noqa: E402

if __name__ == "__main__":
    main()
