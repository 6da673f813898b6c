"""From a program and a mesh to a plan."""
