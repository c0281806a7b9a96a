"""Where values lie, as constraints of torch and Pyro."""
