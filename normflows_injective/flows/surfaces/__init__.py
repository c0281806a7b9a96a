"""Layers on known hypersurfaces: charts, and maps between surfaces."""
