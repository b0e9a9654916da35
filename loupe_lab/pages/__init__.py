"""Helpers of the pages: the style of the figures, multiple-choice questions, the heatmap explorer."""
