"""Put adapters into a model, merge them, and take them out again; choose the modules, and report."""
