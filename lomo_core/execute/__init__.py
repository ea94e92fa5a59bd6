"""How a step's forward and backward passes run. Optimizers, clipping and checkpoints do not know which executor does
it."""
