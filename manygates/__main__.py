"""`python -m manygates` is the command line."""

import sys

from manygates import main

sys.exit(main())
