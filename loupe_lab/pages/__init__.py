"""Helpers of the pages: one style of figures, questions that mark themselves, the heatmap explorer."""
