"""Run the command lines: `genlora` for plans and adapters, and training from YAML files and flags."""
