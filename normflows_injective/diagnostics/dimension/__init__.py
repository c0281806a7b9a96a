"""How many dimensions data have, and how many latent ones a model of them needs."""
