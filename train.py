"""Fine-tune, validate, test or predict: `python train.py fit --config configs/quickstart.yaml`; see `--help`."""

from genlora_lightning.cli.train import main

if __name__ == "__main__":
    main()
