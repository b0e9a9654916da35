"""Drawn birds: a data set that is made, not downloaded, with every answer known."""
