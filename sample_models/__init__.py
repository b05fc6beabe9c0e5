"""Small training-time models in the official key layouts, in plain torch, for trying the tool on something real."""
