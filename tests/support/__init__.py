"""Registries, oracles and small models that several tests share."""
