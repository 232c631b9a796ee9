"""`python -m gkt_fast`."""

import sys

from .cli import main

sys.exit(main())
