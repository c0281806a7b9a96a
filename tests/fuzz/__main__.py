"""Run the search as a script."""

import sys

from fuzz.search import main

sys.exit(main())
