"""Analysis of vision encoders: alignment loss, PCA pictures, attribution, ablations."""
