"""Lightning callbacks that know nothing of adapters: throughput, progress, predictions."""
