"""Principal components in one pass, at the path at which others import them."""

from peft.tuners.lora.incremental_pca import IncrementalPCA as IncrementalPCA
