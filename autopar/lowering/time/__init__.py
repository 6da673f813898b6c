"""Programs cut at a time axis, written as programs again."""
