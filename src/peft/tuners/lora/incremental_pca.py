"""Principal components of data that comes in batches, on any device (Ross et al. 2008, IJCV 77)."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class IncrementalPCA:
    """Principal component analysis in one pass: what is kept are k components, the mean and the variance.

    A batch is added by one decomposition of ``[S V; X - mean of X; c (mean so far - mean of X)]``, c being
    ``sqrt(n m / (n + m))`` for n samples so far and m new ones. Results are those of scikit-learn's class of this
    name, up to signs.

    Args:
        n_components: k; by default as many as the first batch allows.
        copy: leave the data that is given as it is; otherwise it may be overwritten.
        batch_size: of :meth:`fit`; ``5 * features`` by default.
        svd_driver: cuSOLVER's algorithm ("gesvd", "gesvdj", "gesvda") on CUDA devices.
        lowrank: decompose by ``torch.svd_lowrank``, which is faster and approximate.
        lowrank_q: its rank, at least k; ``2 * n_components`` by default. lowrank_niter: its number of iterations.
        lowrank_seed: its seed.

    Attributes:
        components_: ``[k, features]``. singular_values_, explained_variance_, explained_variance_ratio_: ``[k]``.
        mean_, var_: ``[features]``, float64. noise_variance_: mean variance outside the components.
        n_samples_seen_: ``[1]``.

    Raises:
        ValueError: if ``lowrank_q`` is missing or too small.
    """

    components_: torch.Tensor | None
    singular_values_: torch.Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ValueError("lowrank=True needs n_components, or lowrank_q.")
            lowrank_q = 2 * n_components
        if lowrank and None not in (n_components, lowrank_q) and int(lowrank_q or 0) < int(n_components or 0):
            raise ValueError(f"lowrank_q={lowrank_q} must be at least n_components={n_components}.")
        self.n_components, self.copy, self.batch_size, self.svd_driver = n_components, copy, batch_size, svd_driver
        self.lowrank, self.lowrank_q, self.lowrank_niter = lowrank, lowrank_q, lowrank_niter
        self.lowrank_seed = lowrank_seed
        self.components_ = None

    def fit(self, X: torch.Tensor, check_input: bool = True) -> IncrementalPCA:
        """Forget what was seen and take the samples ``[n, features]`` batch by batch."""
        X = self._checked(X) if check_input else X
        self.components_ = None
        if self.batch_size is None:
            self.batch_size = 5 * X.shape[1]
        for batch in self.gen_batches(len(X), self.batch_size, self.n_components or 0):
            self.partial_fit(X[batch], check_input=False)
        return self

    @torch.no_grad()
    def partial_fit(self, X: torch.Tensor, check_input: bool = True) -> IncrementalPCA:
        """Add a batch ``[n, features]``.

        Raises:
            ValueError: if the batch has other features than those before, fewer samples than there are components,
                or values that are not finite.
        """
        X = self._checked(X) if check_input else X
        count, features = X.shape
        first = self.components_ is None
        if first:
            self.n_features_ = features
            self.n_components = min(count, features) if self.n_components is None else self.n_components
            self.mean_, self.var_ = (torch.zeros(features, dtype=torch.float64, device=X.device) for _ in range(2))
            self.n_samples_seen_ = torch.zeros(1, dtype=torch.long, device=X.device)
        k = int(self.n_components or 0)
        if features != self.n_features_:
            raise ValueError(f"this batch has {features} features, those before had {self.n_features_}.")
        if not 1 <= k <= features:
            raise ValueError(f"n_components={k} must be between 1 and the number of features, {features}.")
        if first and count < k:
            raise ValueError(f"n_components={k} needs a first batch of at least as many samples, got {count}.")
        self._add(X, first, k)
        return self

    def _add(self, X: torch.Tensor, first: bool, k: int) -> None:
        count, seen = len(X), int(self.n_samples_seen_)
        total = seen + count
        wide = X.double()
        mean = wide.mean(0)
        shift = self.mean_ - mean
        squares = self.var_ * seen + (wide - mean).square().sum(0) + shift.square() * (seen * count / total)
        X = X.sub_(mean) if not self.copy else X - mean.to(X.dtype)
        if not first:
            step = (seen * count / total) ** 0.5 * shift.to(X.dtype)
            X = torch.vstack([self.singular_values_[:, None] * self.components_, X, step])
        values, components = self._decomposed(X)
        variances = values.square() / max(total - 1, 1)
        self.components_, self.singular_values_ = components[:k], values[:k]
        self.explained_variance_ = variances[:k]
        self.explained_variance_ratio_ = values[:k].square() / squares.sum()
        rest = variances[k:] if k not in (count, wide.shape[1]) else variances[:0]  # as scikit-learn has it
        self.noise_variance_ = rest.mean() if len(rest) else X.new_zeros(())
        self.mean_, self.var_ = self.mean_ - shift * (count / total), squares / total
        self.n_samples_seen_ = self.n_samples_seen_ + count

    def _decomposed(self, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Singular values and right vectors, whose largest entries are positive."""
        if not self.lowrank:
            _, values, right = torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver if X.is_cuda else None)
        else:
            with torch.random.fork_rng(devices=[X.device] if X.is_cuda else [], enabled=self.lowrank_seed is not None):
                if self.lowrank_seed is not None:
                    torch.manual_seed(self.lowrank_seed)
                q = min(self.lowrank_q, *X.shape)
                _, values, right = torch.svd_lowrank(X, q=q, niter=self.lowrank_niter)
            right = right.mT
        largest = right.gather(1, right.abs().argmax(1, keepdim=True))
        return values, right * largest.sign().where(largest != 0, 1)

    def transform(self, X: torch.Tensor) -> torch.Tensor:
        """The coordinates ``[n, k]`` of samples along the components.

        Raises:
            ValueError: if nothing was fitted yet.
        """
        if self.components_ is None:
            raise ValueError("this IncrementalPCA has seen no data: call fit or partial_fit first.")
        return (X - self.mean_.to(X)) @ self.components_.T.to(X)

    def _checked(self, X: torch.Tensor) -> torch.Tensor:
        X = torch.as_tensor(X)
        if X.dim() != 2:
            raise ValueError(f"the data should be [samples, features], got the shape {tuple(X.shape)}.")
        narrow = X.dtype not in (torch.float32, torch.float64)
        X = X.to(torch.float32) if narrow else X  # of which there is a decomposition
        if not X.isfinite().all():
            raise ValueError("the data has values that are not finite.")
        return X

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of ``batch_size`` that cover ``range(n)``; the last one is longer, rather than below the minimum."""
        start = 0
        for _ in range(n // batch_size):
            if n - start - batch_size < min_batch_size and n - start > batch_size:
                break
            yield slice(start, start + batch_size)
            start += batch_size
        if start < n:
            yield slice(start, n)
