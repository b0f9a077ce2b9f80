"""Measure throughput, show progress and write predictions: Lightning callbacks that know nothing of adapters."""
