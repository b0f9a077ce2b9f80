"""Put adapters into a model, merge them, and take them out again; which modules, and a report."""
