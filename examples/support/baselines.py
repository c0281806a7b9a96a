"""What a linear model of the same latent dimension reaches."""

from __future__ import annotations

from sklearn.decomposition import PCA
from torch import Tensor


def pca_error(train: Tensor, test: Tensor, num_components: int) -> float:
    """Mean squared reconstruction error of PCA, summed over dimensions.

    Args:
        train: Data (N, *) to fit on.
        test: Data (M, *) to reconstruct.
        num_components: Latent dimension.

    Returns:
        Mean over the test data.
    """
    train_rows, test_rows = train.flatten(1).numpy(), test.flatten(1).numpy()
    pca = PCA(num_components, random_state=0).fit(train_rows)
    restored = pca.inverse_transform(pca.transform(test_rows))
    return float(((test_rows - restored) ** 2).sum(1).mean())
