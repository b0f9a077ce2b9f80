"""Run the training command line as ``python -m genlora_lightning.cli``; ``python -m genlora_lightning`` is the tool."""

from genlora_lightning.cli.train import main

if __name__ == "__main__":
    main()
