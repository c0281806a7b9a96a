"""The reconstruction error of a linear model of the same latent dimension."""

from __future__ import annotations

from sklearn.decomposition import PCA
from torch import Tensor


def pca_error(train: Tensor, test: Tensor, num_components: int) -> float:
    """Squared error of PCA of data (N, *), summed over dimensions, mean over test data (M, *)."""
    train_rows, test_rows = train.flatten(1).numpy(), test.flatten(1).numpy()
    pca = PCA(num_components, random_state=0).fit(train_rows)
    restored = pca.inverse_transform(pca.transform(test_rows))
    return float(((test_rows - restored) ** 2).sum(1).mean())
