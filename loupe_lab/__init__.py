"""What the book needs beside `loupe_core`: drawn birds, instruments of evidence, helpers of the pages.

Imports go one way: files here use `loupe_core`, which knows nothing of them.
"""
