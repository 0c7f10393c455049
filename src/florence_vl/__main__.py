"""`python -m florence_vl` is `florence-vl`."""

import sys

from florence_vl.cli.main import main

sys.exit(main())
