"""`python -m manygates` is the command line."""

import sys

from manygates.cli import main

sys.exit(main())
