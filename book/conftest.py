"""Settings for `pytest --nbval book`."""

import os

# A progress bar is for someone who watches. On the page it is a dead widget, and no two runs print the same.
os.environ["TQDM_DISABLE"] = "1"
# A sentence of the text that does not hold is an error here; a reader who changed a number gets a line (page.claim).
os.environ["LOUPE_STRICT"] = "1"
