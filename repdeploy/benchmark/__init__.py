"""Measuring: training-time against deploy network, what ran inside them, and why it is as fast as it is."""
