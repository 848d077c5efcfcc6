"""`python -m roofline.report RUN_DIR`."""

import sys

from roofline.report import main

sys.exit(main())
