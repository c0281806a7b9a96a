"""The memory of Pyro's parameter store, and files beside it."""
