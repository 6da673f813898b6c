"""From an equation to its strategies: factors, rules, strategies, resharding."""
