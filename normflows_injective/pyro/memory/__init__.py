"""What Pyro's parameter store and its draws remember."""
