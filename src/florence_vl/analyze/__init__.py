"""Analysis of vision encoders: alignment loss, PCA visualizations, attribution, ablations."""
