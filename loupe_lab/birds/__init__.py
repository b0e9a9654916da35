"""Drawn birds: a data set that is generated instead of downloaded, with every label and part known."""
