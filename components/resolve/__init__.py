"""Step resolve: one checked recipe, cut into slices."""
