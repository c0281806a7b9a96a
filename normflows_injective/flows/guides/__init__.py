"""The parts of guides that need no Pyro: their layers, what is put between, where they lead."""
