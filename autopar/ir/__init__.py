"""From a step to a Program: tracing, inlining, names."""
