"""Run ``genlora push``: upload an adapter folder to the Hugging Face Hub."""

from __future__ import annotations

import argparse


def add_push(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``genlora push``."""
    parser.add_argument("folder", metavar="FOLDER", help="adapter folder; its own files are uploaded, and no other")
    parser.add_argument("repo", metavar="ORG/NAME", help="repository; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch; made if it is not there (default: the main one)")


def run_push(options: argparse.Namespace) -> None:
    """Upload an adapter, after all of it was verified.

    Raises:
        ValueError: It is damaged, or no adapter folder.
        OSError: It is not there, or the Hub cannot be reached or gives no access.
    """
    from genlora_lightning.artifacts.adapter_io import push_adapter

    address = push_adapter(options.folder, options.repo, private=options.private, revision=options.revision)
    print(f"The adapter is in {options.repo}: {address}")
