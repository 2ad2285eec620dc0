"""`python -m gater` is the `gater` command."""

import sys

from gater.cli import main

sys.exit(main())
