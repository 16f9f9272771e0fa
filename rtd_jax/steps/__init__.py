"""Where the steps of a chain begin and end, in characters of its completion."""
