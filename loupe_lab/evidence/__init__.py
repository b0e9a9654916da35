"""Instruments of evidence: other explanations, what reaches the classifier, scores, controls, intervals, results."""
