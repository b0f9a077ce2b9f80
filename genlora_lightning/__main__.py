"""``python -m genlora_lightning``: the ``genlora`` command."""

import sys

from genlora_lightning.cli.main import main

sys.exit(main())
