"""Which equations run in every iteration of a time axis, and which values are complete only after it."""
