"""Pipelines: a step cut into stages on submeshes of their own."""
