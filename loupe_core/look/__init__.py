"""The second look: boxes from a map, the photograph cut to them, and both looks together."""
