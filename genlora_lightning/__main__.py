"""Run the ``genlora`` command as ``python -m genlora_lightning``."""

import sys

from genlora_lightning.cli.main import main

sys.exit(main())
