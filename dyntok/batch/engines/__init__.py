"""How a batch run computes: the stages, and the engines that run them on one machine or on Ray."""
