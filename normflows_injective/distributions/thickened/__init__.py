"""Parts of a low-dimensional law that is thickened by noise: decoders, noise, reverse models."""
