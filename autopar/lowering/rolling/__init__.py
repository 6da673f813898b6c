"""Layers written out one by one, rolled into scans: repeats found, checked by dataflow, written as loops."""
