"""The paper's experiment on CUB-200-2011 at full size: `loupe reproduce`."""
