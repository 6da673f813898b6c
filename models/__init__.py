"""Plain Flax train steps, each with `make(**settings) -> (train_step, state, batch)`, without autopar."""
