"""``python -m genlora_lightning``: the ``genlora`` command."""

import sys

from genlora_lightning.tool import main

sys.exit(main())
