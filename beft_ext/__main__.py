"""``python -m beft_ext``: the command line, as ``torchrun -m beft_ext`` starts it."""

import sys

from beft_ext.commands.cli import main

sys.exit(main())
