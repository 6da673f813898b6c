"""Stage slicing: what stages cost, layer by layer, and the search over them."""
