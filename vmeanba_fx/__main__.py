"""``python -m vmeanba_fx`` is the command ``vmeanba-fx``."""

import sys

from vmeanba_fx.cli import main

sys.exit(main())
